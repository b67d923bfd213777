# SPDX-License-Identifier: Apache-2.0
"""Peak memory of converting a sharded text model of 2 GB, and what a conversion leaves that is killed half-way."""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from modeling_moma import MomaForCausalLM
from tokenization import MomaProcessor, train_text_tokenizer


ROOT = Path(__file__).parents[1]
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=8,
    num_attention_heads=32,
    num_key_value_heads=32,
)
SHARD_BYTES = 400_000_000
LIMIT = 1.5e9


@dataclass
class Measurement:
    """One conversion: its largest resident memory in bytes, its seconds, and its receipt."""

    peak: int
    seconds: float
    receipt: dict


def make_checkpoint(folder: Path) -> int:
    """Write random weights, shard by shard; returns their size in bytes."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(CONFIG).state_dict().items()}
    shards, size = [[]], 0
    for name, shape in shapes.items():
        num_bytes = 4 * math.prod(shape)
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.randn(shapes[name]) * CONFIG.initializer_range for name in names}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    CONFIG.save_pretrained(folder)
    train_text_tokenizer(["noto: red apple", "twemoji: green apple"] * 3, 300).save_pretrained(folder)
    return sum(4 * math.prod(shape) for shape in shapes.values())


def start(source: Path, output: Path, processor: str, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "modeling_moma", "convert", "llama", "--source", str(source)]
    command += ["--output", str(output), "--processor", processor, "--max-shard-size", "400MB", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def peak_memory(process: subprocess.Popen) -> int:
    """Largest resident memory of a process, in bytes, followed to its end."""
    peak = 0
    while process.poll() is None:
        # the process's own mark: that of its exit status would count what the parent held when it forked
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak = max(peak, 1024 * int(line.split()[1]))
        time.sleep(0.02)
    return peak


def measure(source: Path, output: Path, processor: str, *options: str) -> Measurement:
    started = time.perf_counter()
    process = start(source, output, processor, *options)
    peak = peak_memory(process)
    text, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"The conversion failed: {errors[-2000:]}")
    print(text.strip())
    seconds = time.perf_counter() - started
    print(f"peak memory {peak / 1e9:.2f} GB, {seconds:.0f} s, {' '.join(options) or 'with probe'}\n")
    return Measurement(peak, seconds, json.loads((output / "conversion.json").read_text()))


def kill_half_way(source: Path, output: Path, processor: str) -> bool:
    """Kill a conversion when its second file begins; returns whether any folder loads afterwards."""
    hidden = f".{output.name}.*.partial"
    process = start(source, output, processor)
    while not list(output.parent.glob(f"{hidden}/model-00002-*")):
        if process.poll() is not None:
            raise RuntimeError(f"The conversion ended by itself: {process.communicate()[1][-2000:]}")
        time.sleep(0.01)
    process.kill()
    process.communicate()
    (aside,) = output.parent.glob(hidden)
    print(f"killed with {sorted(path.name for path in aside.glob('model-*'))} written")
    return any(loads(folder) for folder in (output, aside))


def loads(folder: Path) -> bool:
    try:
        AutoConfig.from_pretrained(folder)
        MomaForCausalLM.from_pretrained(folder, device_map="meta")
    except (OSError, ValueError):
        return False
    return True


def report(size: int, files: int, with_probe: Measurement, without: Measurement) -> list[str]:
    receipt = with_probe.receipt
    return [
        f"# Memory of a conversion, {date.today()}",
        "",
        "`python benchmarks/convert_memory.py`: `moma convert llama --max-shard-size 400MB` on random weights, "
        f"{CONFIG.num_hidden_layers} layers of width {CONFIG.hidden_size}, vocabulary {CONFIG.vocab_size}, float32. "
        f"torch {torch.__version__}, cpu, {torch.get_num_threads()} threads, {platform.machine()}. Peak memory is the "
        "process's own largest resident set.",
        "",
        "| | |",
        "|---|---:|",
        f"| source | {size / 1e9:.2f} GB in {files} files |",
        f"| output | {receipt['tensor_bytes'] / 1e9:.2f} GB in {receipt['files']} files |",
        f"| peak memory, with the probe | {with_probe.peak / 1e9:.2f} GB |",
        f"| peak memory, without | {without.peak / 1e9:.2f} GB |",
        f"| peak memory allowed | {LIMIT / 1e9:.2f} GB |",
        f"| seconds, with the probe | {with_probe.seconds:.0f} |",
        f"| seconds, without | {without.seconds:.0f} |",
        f"| relative output difference | {receipt['relative_difference']:.1e} |",
        f"| probability of new tokens | {receipt['new_token_probability']:.2%} |",
        "| killed half-way: a folder loads | no |",
        "| killed half-way: the next run succeeds, and clears its rest away | yes |",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processor", default=str(ROOT / "model_cards" / "moma-emoji"))
    parser.add_argument("--folder", help="where to put the checkpoints, of 6 GB at a time; a temporary one by default")
    parser.add_argument("--report", help="folder for a dated report")
    args = parser.parse_args()
    MomaProcessor.from_pretrained(args.processor)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        (folder / "source").mkdir()
        size = make_checkpoint(folder / "source")
        files = len(list((folder / "source").glob("*.safetensors")))
        print(f"source: {size / 1e9:.2f} GB in {files} files")
        if kill_half_way(folder / "source", folder / "moma", args.processor):
            sys.exit("FAILED: the killed conversion left a folder that loads")
        # over what the killed one left
        with_probe = measure(folder / "source", folder / "moma", args.processor)
        if not loads(folder / "moma") or list(folder.glob(".moma.*")):
            sys.exit("FAILED: the converted folder does not load, or the killed conversion's rest is still there")
        without = measure(folder / "source", folder / "second", args.processor, "--no-probe")
    lines = report(size, files, with_probe, without)
    print("\n".join(lines))
    if max(with_probe.peak, without.peak) > LIMIT:
        sys.exit(f"FAILED: the peak is above {LIMIT / 1e9} GB")
    if args.report:
        path = Path(args.report) / f"{date.today()}-convert-memory.md"
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
