# SPDX-License-Identifier: Apache-2.0
"""Writes what the released models and twenty random ones say, and compares two such folders to the last bit.

PYTHONPATH=other-checkout python scripts/compare_revisions.py write before
python scripts/compare_revisions.py write after --models before
python scripts/compare_revisions.py compare before after

The second may run with other libraries, too; it loads the random models that the first has saved.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_moma import MomaConfig, MomaForCausalLM
from modeling_moma.labelling.labeler import open_labeler


ROOT = Path(__file__).resolve().parents[1]
RELEASED = ("moma-icons", "moma-emoji")
RULES = ("expert_choice", "threshold", "token_choice")
# JSON fields that name the writer's version, or that a later one dropped
UNCOMPARED = ("transformers_version", "cover_all_tokens", "depth_pool", "depth_threshold_momentum")


def random_fields(seed: int) -> dict:
    """A small model of 40 ids, of which 8 to 23 are codes, with an image of 4 between 24 and 25."""
    choose = random.Random(seed).choice
    rule = choose(RULES)
    fields = {
        "vocab_size": 40,
        "hidden_size": choose([16, 32]),
        "intermediate_size": choose([16, 24]),
        "num_hidden_layers": choose([2, 3]),
        "num_attention_heads": 4,
        "num_key_value_heads": choose([1, 2, 4]),
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "modality_token_ranges": {"image": [[8, 24]]},
        "begin_image_token_id": 24,
        "end_image_token_id": 25,
        "image_seq_length": 4,
        "tie_word_embeddings": choose([True, False]),
        "attention_bias": choose([True, False]),
        "num_experts": choose([{"text": 1, "image": 1}, {"text": 4, "image": 2}, {"text": 1, "image": 4}]),
        "shared_expert_intermediate_size": choose([None, {"text": 16, "image": 16}]),
        "norm_placement": choose(["pre", "post"]),
        "qk_norm": choose(["layernorm", "rmsnorm", "none"]),
        "untied_attention": choose([True, False]),
        "normalize_gates": choose([True, False]),
        "training_routing": rule,
        "inference_routing": "threshold" if rule == "expert_choice" else rule,
        "expert_capacity_factor": choose([1.0, 1.5]),
    }
    if seed % 4 == 3:
        fields |= {"depth_layers": [1], "depth_capacity": 0.5}
    return fields


def numbers(rows: list[list[int]], length: int) -> torch.Tensor:
    return torch.tensor([(row + [-1] * length)[:length] for row in rows])


@torch.no_grad()
def of_model(model: MomaForCausalLM, ids: torch.Tensor, prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {"logits": model(ids).logits}
    if not model.config.depth_layers:
        found |= {rule: model(ids, routing=rule).logits for rule in RULES}
    found["loss"] = model(ids, labels=ids).loss
    for mode in ("text", "image"):
        torch.manual_seed(0)
        steps = {"max_new_tokens": 16 if mode == "text" else model.config.image_seq_length + 2}
        found[mode] = model.generate(prompt, generation_mode=mode, do_sample=mode == "image", **steps)
    return found


def of_released(name: str) -> dict[str, torch.Tensor]:
    folder = ROOT / "model_cards" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    images = load_dataset(str(ROOT / "data" / "icons"), split="test")[:8]["image"]
    codes = processor.encode_images(images)
    row = processor(images=[images[:1]], text=["<image>folder (typical)"], return_tensors="pt")["input_ids"]
    prompt = processor(text=["folder (typical)"], return_tensors="pt")["input_ids"]
    found = {"codes": torch.as_tensor(codes).flatten(1), "ids": row, **of_model(model, row, prompt)}
    drawn = processor.decode_images(model.decode_image_tokens(found["image"]))[0]
    found["pixels"] = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8)
    if name == "moma-icons":
        labeler = open_labeler(str(folder))
        coded = labeler.encode(images)
        found["match"] = labeler.match(coded, ["cog", "arrow left", "music"])
        for kind, guesses in (("names", labeler.names(coded, 5)), ("tags", labeler.tags(coded, 8))):
            texts = json.dumps([[(guess.text, guess.probability) for guess in some] for some in guesses])
            found[kind] = torch.frombuffer(bytearray(texts.encode()), dtype=torch.uint8)
    return {f"{name}/{key}": value for key, value in found.items()}


def write(output: Path, models: Path | None):
    output.mkdir(parents=True)
    found = {}
    for name in RELEASED:
        found |= of_released(name)
    ids = torch.randint(26, 40, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 5:11] = torch.tensor([24, 9, 12, 20, 8, 25])
    for seed in range(20):
        torch.manual_seed(seed)
        if models is None:
            model = MomaForCausalLM(MomaConfig(**random_fields(seed)))
        else:
            model = AutoModelForCausalLM.from_pretrained(models / "models" / str(seed))
        model.save_pretrained(output / "models" / str(seed))
        found |= {f"{seed}/{key}": value for key, value in of_model(model.eval(), ids, ids[:, :4]).items()}
    for name in RELEASED:
        folder = ROOT / "model_cards" / name
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(output / "models" / name)
        AutoProcessor.from_pretrained(folder).save_pretrained(output / "models" / name)
    save_file({name: value.contiguous() for name, value in found.items()}, output / "outputs.safetensors")


def content(path: Path):
    if path.suffix != ".json":
        return path.read_bytes()
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in UNCOMPARED}


def difference(one: torch.Tensor, other: torch.Tensor | None) -> str:
    """Tell by how much an output differs; nothing where both are equal."""
    if other is None or one.shape != other.shape:
        return "missing, or of another shape"
    if torch.equal(one, other):
        return ""
    return f"{(one.double() - other.double()).abs().max() / one.double().abs().max():.1e} of the largest"


def compare(one: Path, other: Path) -> int:
    first, second = (load_file(folder / "outputs.safetensors") for folder in (one, other))
    differing = [f"{name}: {told}" for name in first if (told := difference(first[name], second.get(name)))]
    files = [sorted(path.relative_to(folder) for path in folder.rglob("models/**/*.*")) for folder in (one, other)]
    # the code that goes along is the revision's own
    files = [[path for path in paths if path.suffix != ".py"] for paths in files]
    differing += [str(path) for path in set(files[0]) ^ set(files[1])]
    differing += [str(path) for path in files[0] if path in files[1] and content(one / path) != content(other / path)]
    print(f"{len(first)} outputs and {len(files[0])} files, of which {len(differing)} differ", *differing, sep="\n")
    return int(bool(differing))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writes = commands.add_parser("write")
    writes.add_argument("output", type=Path)
    writes.add_argument("--models", type=Path, help="a folder written before, whose random models are taken")
    compares = commands.add_parser("compare")
    compares.add_argument("folders", type=Path, nargs=2)
    args = parser.parse_args()
    if args.command == "compare":
        return compare(*args.folders)
    write(args.output, args.models)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
