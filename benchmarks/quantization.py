# SPDX-License-Identifier: Apache-2.0
"""Size, held-out loss and speed of a MoMa, quantised in several ways against the same model in fp32.

Each way has to keep routers, norms and embeddings, to stay within 1 % of the full loss and to load as it was saved,
before anything is timed. The ways then take turns, and ratios of medians are reported.
"""

import argparse
import importlib.metadata
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from datasets import load_dataset
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, TorchAoConfig

from modeling_moma import MomaForCausalLM, quantized_share, torchao_config
from tokenization import MomaProcessor


WAYS = {
    "fp32": lambda: None,
    "torchao int8 weights, experts too": lambda: torchao_config(Int8WeightOnlyConfig(set_inductor_config=False)),
    "torchao int8 weights and activations, experts too": lambda: torchao_config(
        Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    ),
    "torchao int8 weights, nn.Linear only": lambda: TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False)),
    "torchao int8 weights and activations, nn.Linear only": lambda: TorchAoConfig(
        Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    ),
    "bitsandbytes 8 bit, nn.Linear only": lambda: BitsAndBytesConfig(load_in_8bit=True),
}
LIMIT = 1.01


def held_out_batches(folder: str, data: str, pictures: int, batch_size: int) -> list[dict]:
    """Held-out pictures with their captions, in both orders; labels leave out padding."""
    processor = MomaProcessor.from_pretrained(folder)
    rows = load_dataset(data, split="test").shuffle(seed=0)
    rows = rows.select(range(min(pictures, len(rows))))
    end = processor.tokenizer.eos_token
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        captions = [f"{style}: {label}" for style, label in zip(part["style"], part["label"], strict=True)]
        images = [[image] for image in part["image"]]
        for texts in ([f"<image>{text}{end}" for text in captions], [f"{text}<image>{end}" for text in captions]):
            options = {"padding": True, "return_labels": True, "return_tensors": "pt"}
            batches.append(dict(processor(images=images, text=texts, **options)))
    return batches


@torch.no_grad()
def mean_loss(model: MomaForCausalLM, batches: list[dict]) -> float:
    """Cross-entropy per target token, in nats, with causal routing."""
    total = count = 0
    for batch in batches:
        output = model(**batch, use_cache=False)
        tokens = sum(int(tokens) for tokens in output.modality_tokens.values())
        total += float(output.loss) * tokens
        count += tokens
    return total / count


def saved_size(model: MomaForCausalLM, batch: dict) -> int:
    """Bytes of the saved weights, which have to load with the same loss."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = MomaForCausalLM.from_pretrained(folder)
        before, after = mean_loss(model, [batch]), mean_loss(loaded, [batch])
        if abs(after - before) > 1e-3 * before:
            raise RuntimeError(f"The loss is {before} before and {after} after saving and loading.")
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def check_kept(model: MomaForCausalLM, full: MomaForCausalLM):
    """Routers, norms, embedding and head have to be what they were."""
    before = dict(full.named_parameters())
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        is_kept = any(part.endswith(("norm", "router")) for part in parts) or {"embed_tokens", "lm_head"} & set(parts)
        if is_kept and not torch.equal(parameter, before[name]):
            raise RuntimeError(f"{name} is not what it was.")


@torch.no_grad()
def seconds(model: MomaForCausalLM, batch: dict) -> tuple[float, float]:
    """Of a forward of the batch, and of a picture drawn code by code from no words at all."""
    start = time.perf_counter()
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    middle = time.perf_counter()
    prompt = torch.tensor([[model.config.bos_token_id]])
    model.generate(input_ids=prompt, do_sample=False, generation_mode="image")
    return middle - start, time.perf_counter() - middle


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="model_cards/moma-emoji")
    parser.add_argument("--data", default="data/emoji")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--report", help="folder for a dated report")
    args = parser.parse_args(arguments)
    batches = held_out_batches(args.model, args.data, args.pictures, args.batch_size)
    models, losses, sizes = {}, {}, {}
    for way, make in WAYS.items():
        models[way] = MomaForCausalLM.from_pretrained(args.model, dtype=torch.float32, quantization_config=make())
        losses[way] = mean_loss(models[way], batches)
        if losses[way] > LIMIT * losses["fp32"]:
            raise RuntimeError(f"{way}: the loss rises from {losses['fp32']} to {losses[way]}.")
        check_kept(models[way], models["fp32"])
        sizes[way] = saved_size(models[way], batches[0])
    times = {way: ([], []) for way in WAYS}
    for _ in range(args.rounds):
        for way, model in models.items():
            for values, value in zip(times[way], seconds(model, batches[0]), strict=True):
                values.append(value)
    medians = {way: [statistics.median(values) for values in both] for way, both in times.items()}
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torchao", "bitsandbytes"))
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    lines = [
        f"# Quantisation on CPU, {date.today()}",
        "",
        f"`python benchmarks/quantization.py --report benchmarks/reports`: {args.model}, {tokens} held-out target "
        f"tokens, causal routing. Time against fp32, more than 1 is slower: a forward of {args.batch_size} sequences, "
        f"and a picture drawn code by code; medians of {args.rounds}, eager. "
        f"torch {torch.__version__}, {libraries}, {torch.get_num_threads()} threads, {platform.machine()}.",
        "",
        "| way | share of the weights | MB on disk | loss | rise | time of a forward | time of a drawing |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for way in WAYS:
        forward, generate = (a / b for a, b in zip(medians[way], medians["fp32"], strict=True))
        rise = losses[way] / losses["fp32"] - 1
        lines.append(
            f"| {way} | {quantized_share(models[way]):.1%} | {sizes[way] / 1e6:.1f} | {losses[way]:.4f} | {rise:+.3%} "
            f"| {forward:.2f} | {generate:.2f} |"
        )
    print("\n".join(lines))
    if args.report:
        path = Path(args.report) / f"{date.today()}-quantization-cpu.md"
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
