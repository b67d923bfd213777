# SPDX-License-Identifier: Apache-2.0
"""Measure the data pipeline: tokenizing by one and by two processes, its memory, and the stream against a step.

python benchmarks/data_pipeline.py scaling --processor P
python benchmarks/data_pipeline.py memory --images 100000
python benchmarks/data_pipeline.py stream --recipe recipes/mixture.yaml --processor P --tokens T
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from datasets import Dataset, Features, Image, Value, load_dataset

from modeling_moma import MomaForCausalLM
from modeling_moma.cli.arguments import add_renamed
from modeling_moma.data.examples import open_documents
from modeling_moma.data.jobs import plan_job, write_job
from modeling_moma.data.packing import PackedExamples
from modeling_moma.data.sources import read_sources
from modeling_moma.data.workers import run_tasks
from modeling_moma.training.pretraining import model_config
from modeling_moma.training.recipe import read_recipe
from tokenization import (
    MomaImageProcessor,
    MomaProcessor,
    MomaVQConfig,
    MomaVQModel,
    add_image_tokens,
    train_text_tokenizer,
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["scaling", "memory", "stream"])
    parser.add_argument("--recipe", default="recipes/mixture.yaml", help="of `stream`")
    parser.add_argument("--processor", help="folder of a MomaProcessor")
    parser.add_argument("--tokens", help="of `stream`: folder that `moma tokenize` wrote with it")
    add_renamed(parser, "--images", "--pictures", type=int, default=2048, help="of `scaling` and `memory`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of `stream`: training steps to time")
    return parser.parse_args(arguments)


def repeated_emoji(folder: Path, number: int) -> dict:
    """A source of so many of the emoji, the set repeated, each a little brighter than the time before."""
    emoji = load_dataset("data/emoji", split="train").select_columns(["image", "label"])

    def rows():
        for index in range(number):
            row = emoji[index % len(emoji)]
            pixels = np.asarray(row["image"].convert("RGB"), dtype=np.int16) + index // len(emoji)
            yield {"image": pixels.clip(0, 255).astype(np.uint8), "label": row["label"]}

    features = Features({"image": Image(), "label": Value("string")})
    Dataset.from_generator(rows, features=features, cache_dir=str(folder / "cache")).to_parquet(
        folder / "train.parquet"
    )
    return {"pictures": {"data": str(folder / "train.parquet"), "image": "image", "text": "label"}}


def small_processor(folder: Path) -> str:
    """A processor that codes thousands of images a second: what is measured is everything around it."""
    torch.manual_seed(0)
    config = MomaVQConfig.from_preset(
        "small", channel_multiplier=(1,), base_channels=8, latent_channels=8, use_trunk=False, semantic_dim=None
    )
    tokenizer = add_image_tokens(train_text_tokenizer(["red apple"] * 3, vocab_size=300), config.num_embeddings)
    processor = MomaProcessor(MomaImageProcessor.for_resolution(64), tokenizer, MomaVQModel(config))
    processor.save_pretrained(folder)
    return str(folder)


class MemoryWatch:
    """Samples what this process and its children hold, in MiB, every quarter of a second.

    Pages of mapped files are left out: the system takes them back when it wants to.
    """

    def __enter__(self) -> "MemoryWatch":
        self.samples: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *rest):
        self._done.set()
        self._thread.join()

    def _watch(self):
        own = psutil.Process()
        while not self._done.wait(0.25):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += anonymous_bytes(process)
                except (psutil.Error, OSError):
                    continue
            self.samples.append(total / 2**20)

    def median(self, begin: float, end: float) -> float:
        """Median of a part of the samples, from 0 to 1."""
        count = len(self.samples)
        return statistics.median(self.samples[int(begin * count) : max(int(end * count), int(begin * count) + 1)])


def anonymous_bytes(process: psutil.Process) -> int:
    """Memory of a process that no file stands behind; all of its own where the system does not tell."""
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    if not rollup.exists():
        return process.memory_full_info().uss
    line = next(line for line in rollup.read_text().splitlines() if line.startswith("Anonymous:"))
    return 1024 * int(line.split()[1])


def measure_scaling(args: argparse.Namespace) -> dict:
    """Seconds of the whole command `moma tokenize` for the same images, by one process and by two, in turn."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.json"
        recipe.write_text(json.dumps({"sources": repeated_emoji(folder, args.images)}))
        given = [sys.executable, "-m", "modeling_moma", "tokenize", str(recipe), "--processor", args.processor]
        # the first one, which is not counted, leaves what `datasets` keeps of the sources
        for number in range(args.rounds + 1):
            for processes in seconds:
                output = folder / f"tokens-{number}-{processes}"
                began = time.perf_counter()
                command = [*given, "--output", str(output), "--processes", str(processes)]
                subprocess.run(command, check=True, capture_output=True)
                if number:
                    seconds[processes].append(time.perf_counter() - began)
    by = {processes: statistics.median(values) for processes, values in seconds.items()}
    return {"pictures": args.images, "seconds": seconds, "one_over_two": by[1] / by[2]}


def measure_memory(args: argparse.Namespace) -> dict:
    """Memory of all processes in the course of one long tokenization."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor = args.processor or small_processor(folder / "processor")
        sources = read_sources(repeated_emoji(folder, args.images))
        job = plan_job(sources, processor, 512, True, 0)
        write_job(folder / "tokens", job)
        began = time.perf_counter()
        with MemoryWatch() as watch:
            run_tasks(folder / "tokens", job, 2)
        seconds = time.perf_counter() - began
    return {
        "pictures": args.images,
        "shards": len(job.tasks()),
        "seconds": seconds,
        "mib_second_fifth": watch.median(0.2, 0.4),
        "mib_last_fifth": watch.median(0.8, 1.0),
        "mib_peak": max(watch.samples),
    }


def measure_stream(args: argparse.Namespace) -> dict:
    """Tokens per second of the packed stream, on one thread without workers, and of a training step."""
    recipe, processor = read_recipe(args.recipe), MomaProcessor.from_pretrained(args.processor)
    documents = open_documents(args.tokens, processor, sources=recipe.sources)
    weights = [source.weight for source in recipe.sources]
    length, batch = recipe.data.sequence_length, recipe.trainer["per_device_train_batch_size"]
    frames = [(frame.begin, frame.end) for frame in processor.frames.values()]
    stream = PackedExamples(documents, weights, length, 10**6, processor.tokenizer.pad_token_id, frames)
    read, counts, padding = [], np.zeros(len(documents)), 0
    for number in range(args.rounds):
        began = time.perf_counter()
        rows = [stream[number * 512 + index] for index in range(512)]
        read.append(512 * length / (time.perf_counter() - began))
        sources = torch.cat([row["source_ids"] for row in rows]).numpy()
        counts += np.bincount(sources[sources >= 0], minlength=len(documents))
        padding += int((sources < 0).sum())
    model = MomaForCausalLM(model_config(recipe, processor, {})).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    steps = []
    for number in range(args.steps + 2):
        rows = [stream[number * batch + place] for place in range(batch)]
        inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "source_ids"}
        began = time.perf_counter()
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.perf_counter() - began)
    step = statistics.median(steps[2:])
    shares = counts / counts.sum()
    return {
        "stream_tokens_per_second": statistics.median(read),
        "step_tokens_per_second": batch * length / step,
        "stream_over_step": statistics.median(read) * step / (batch * length),
        "threads": torch.get_num_threads(),
        "shares": {source.name: float(share) for source, share in zip(recipe.sources, shares)},
        "weights": {source.name: source.weight / sum(weights) for source in recipe.sources},
        "padding_share": padding / (args.rounds * 512 * length),
    }


def main(arguments: Sequence[str] | None = None) -> dict:
    args = parse_arguments(None if arguments is None else list(arguments))
    measures = {"scaling": measure_scaling, "memory": measure_memory, "stream": measure_stream}
    report = measures[args.case](args)
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
