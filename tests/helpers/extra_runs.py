# SPDX-License-Identifier: Apache-2.0
"""What each extra is for, on small inputs: a function `run_EXTRA` for each, in an environment of that extra alone."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from helpers.chat_requests import CHAT, address_of, disc, png
from helpers.mixed import mixed_examples
from helpers.mixture import write_mixture
from helpers.tiny import TEXTS, four_steps, mixed_ids, tiny_model, tiny_processor, tiny_vq_model, write_training
from modeling_moma import MomaForCausalLM, quantized_share, torchao_config
from tokenization import train_text_tokenizer


ROOT = Path(__file__).resolve().parents[2]
RELEASED = str(ROOT / "model_cards" / "moma-icons")
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><circle cx="12" cy="12" r="9"/></svg>'


def moma(*arguments: str | Path, before=("-m", "modeling_moma"), **variables: str):
    subprocess.run([sys.executable, *before, *map(str, arguments)], check=True, env={**os.environ, **variables})


def tokenize(folder: Path, *engine: str):
    tiny_processor().save_pretrained(folder / "processor")
    paths = ["--processor", folder / "processor", "--output", folder / "tokens"]
    moma("tokenize", write_mixture(folder / "data"), *paths, *engine)
    assert (folder / "tokens" / "manifest.json").is_file()


def run_train(folder: Path):
    """a step of `moma train-image-tokenizer` with the perceptual loss"""
    config, recipe = folder / "config.json", write_mixture(folder / "data")
    config.write_text(json.dumps(tiny_vq_model(32).config.to_diff_dict()))
    fields = (f"config={config}", "steps=1", "batch_size=2", "warmup_steps=0", "perceptual_weight=1")
    sizes = ("--set", *(f"image_tokenizer.{field}" for field in fields))
    moma("train-image-tokenizer", recipe, *sizes, "--output", folder / "tokenizer")


def run_finetune(folder: Path):
    """a step of TRL's `SFTTrainer` on LoRA adapters"""
    import trl
    from peft import LoraConfig

    processor = tiny_processor()
    trainer = trl.SFTTrainer(
        model=tiny_model(processor),
        args=trl.SFTConfig(str(folder), max_steps=1, max_length=None, report_to=[], use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(mixed_examples(processor, 4)),
        processing_class=processor.tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
    )
    assert trainer.train().training_loss > 0


def run_eval(folder: Path):
    """a task of lm-eval on `moma-icons`"""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from modeling_moma.evaluation.harness import MomaTextLM

    (folder / "rows.json").write_text(json.dumps([{"name": "arrow left"}, {"name": "house"}]))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}}}
    kind = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{name}}"}
    task = {"task": "names", "test_split": "test", **source, **kind, "metric_list": [{"metric": "byte_perplexity"}]}
    # JSON is YAML
    (folder / "names.yaml").write_text(json.dumps(task))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    model = MomaTextLM(pretrained=RELEASED, dtype="float32", device="cpu", batch_size=2)
    found = lm_eval.simple_evaluate(model, tasks=["names"], task_manager=manager, bootstrap_iters=0)
    assert found["results"]["names"]["byte_perplexity,none"] > 1


def run_gguf(folder: Path):
    """`moma convert llama` of a GGUF file of one layer"""
    import gguf

    words = json.loads(train_text_tokenizer(TEXTS, vocab_size=300).backend_tokenizer.to_str())["model"]
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64}
    numbers |= {"head_count": 2, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "vocab_size": len(tokens)}
    tokenizer = {"tokenizer_model": "gpt2", "token_list": tokens, "bos_token_id": 1, "eos_token_id": 2}
    tokenizer["token_merges"] = [" ".join(pair) for pair in words["merges"]]
    for name, value in {**numbers, **tokenizer}.items():
        getattr(writer, f"add_{name}")(value)
    layer = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (32, 32))
    layer |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {f"blk.0.{name}": shape for name, shape in layer.items()}
    for name, shape in {**shapes, "token_embd": (len(tokens), 32), "output_norm": (32,)}.items():
        writer.add_tensor(f"{name}.weight", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tiny_processor().save_pretrained(folder / "processor")
    source = ["--source", folder, "--gguf-file", "tiny.gguf", "--processor", folder / "processor"]
    moma("convert", "llama", *source, "--output", folder / "converted")


def run_quantize(folder: Path):
    """int8 of torchao and of bitsandbytes"""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import BitsAndBytesConfig

    tiny_model().save_pretrained(folder)
    for config in (torchao_config(Int8WeightOnlyConfig()), BitsAndBytesConfig(load_in_8bit=True)):
        model = MomaForCausalLM.from_pretrained(folder, quantization_config=config).eval()
        assert quantized_share(model) > 0 and model(mixed_ids()).logits.isfinite().all()


def run_export(folder: Path):
    """ONNX graphs of an image tokenizer, and codes of an image by them"""
    import onnxruntime

    from modeling_moma.export.image_tokenizer import export_image_tokenizer

    model, pixels = tiny_vq_model(), torch.rand(1, 3, 16, 16)
    session = onnxruntime.InferenceSession(export_image_tokenizer(model, folder / "onnx").encoder)
    assert (session.run(None, {"pixel_values": pixels.numpy()})[0] == model.get_image_tokens(pixels).numpy()).all()


def run_deepspeed(folder: Path):
    """`moma pretrain` under `deepspeed_zero3.yaml`, by one process on a CPU"""
    write_training(folder)
    config = ROOT / "configs" / "accelerate" / "deepspeed_zero3.yaml"
    launch = f"-m accelerate.commands.launch --config_file {config} --num_processes 1 --mixed_precision no"
    before = [*launch.split(), "-m", "modeling_moma"]
    moma("pretrain", *four_steps(folder, folder / "model", "recipe"), before=before, DS_ACCELERATOR="cpu")


def run_scale(folder: Path):
    """shards of `moma tokenize --plan` as tasks of datatrove"""
    from datatrove.executor import LocalPipelineExecutor

    from modeling_moma.data.tokenizing import TokenizeStep

    tokenize(folder, "--plan")
    LocalPipelineExecutor([TokenizeStep(str(folder / "tokens"))], tasks=2, logging_dir=str(folder / "logs")).run()
    tokenize(folder)


def run_corpora(folder: Path):
    """a page of a manual and its drawing, read and copied"""
    from corpora_recipe.manual import copy_images, read_manual

    (folder / "disc.svg").write_text(SVG)
    body = "<p>A <img src='disc.svg'/> is round.</p>"
    (folder / "disc.html").write_text(f"<html><head><title>Discs</title></head><body>{body}</body></html>")
    copy_images(read_manual(folder, validation_share=0.5), folder / "copied")
    assert list((folder / "copied").rglob("disc.svg.png"))


def run_serve(folder: Path):
    """`moma serve` on `moma-icons`, and a caption over HTTP"""
    from helpers.server_process import running

    image = {"type": "image_url", "image_url": {"url": address_of(png(disc("red")))}}
    question = {"model": RELEASED, "messages": [{"role": "user", "content": [image]}], "temperature": 0}
    with running([sys.executable, "-m", "modeling_moma", "serve", RELEASED], folder / "log") as (address, _):
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(address + CHAT, json.dumps(question).encode(), head)
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"]


def run_demo(folder: Path):
    """`moma demo` on `moma-icons`, and its page"""
    from page_images import served_page

    with served_page(RELEASED, log=folder / "log") as address, urllib.request.urlopen(address) as page:
        assert b"gradio" in page.read()


def run_icons(folder: Path):
    """`moma label` on an SVG"""
    (folder / "disc.svg").write_text(SVG)
    moma("label", folder, "--model", RELEASED, "--output", folder / "labels.csv")
    assert "disc.svg" in (folder / "labels.csv").read_text()


def run_audio(folder: Path):
    """`moma train-audio-tokenizer` on tones of two rates"""
    from helpers.sounds import as_file, tone

    rows = []
    for place in range(8):
        rate = (8000, 16000)[place % 2]
        (folder / f"{place}.wav").write_bytes(as_file(tone(200 * place + 100, 0.2, rate), rate))
        rows.append(json.dumps({"audio": str(folder / f"{place}.wav"), "word": "tone"}))
    (folder / "tones.jsonl").write_text("\n".join(rows))
    source = {"data": str(folder / "tones.jsonl"), "audio": "audio", "text": "word"}
    recipe = {"sources": {"tones": source}, "audio_tokenizer": {"num_codes": 16, "sampling_rate": 8000}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    moma("train-audio-tokenizer", folder / "recipe.json", "--output", folder / "codec")


def run_docs(folder: Path):
    """`mkdocs build --strict`"""
    moma("build", "--strict", "--site-dir", folder, before=("-m", "mkdocs"), NO_MKDOCS_2_WARNING="1")


if __name__ == "__main__":
    globals()[f"run_{sys.argv[1]}"](Path(sys.argv[2]))
