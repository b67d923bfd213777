# SPDX-License-Identifier: Apache-2.0
"""Measure the data pipeline: tokenizing by one and by two processes, its memory, and the stream against a step.

`engines` runs the whole command on images that all differ, with nothing cached, by each engine in turn.

python benchmarks/data_pipeline.py scaling --processor P
python benchmarks/data_pipeline.py memory --images 100000
python benchmarks/data_pipeline.py engines --images 100000 --runs ray:1 ray:2 --kill
python benchmarks/data_pipeline.py stream --recipe recipes/mixture.yaml --processor P --tokens T
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, Image, Value, load_dataset

from modeling_moma import MomaForCausalLM
from modeling_moma.data.examples import open_documents
from modeling_moma.data.jobs import plan_job, read_job, write_job
from modeling_moma.data.packing import PackedExamples
from modeling_moma.data.sources import read_sources
from modeling_moma.data.workers import run_tasks
from modeling_moma.training.pretraining import model_config
from modeling_moma.training.recipe import read_recipe
from modeling_moma.utils.atomic_files import LEFT_OVER
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
    parser.add_argument("case", choices=["scaling", "memory", "engines", "stream"])
    parser.add_argument("--recipe", default="recipes/mixture.yaml", help="of `stream`")
    parser.add_argument("--processor", help="folder of a MomaProcessor")
    parser.add_argument("--tokens", help="of `stream`: folder that `moma tokenize` wrote with it")
    parser.add_argument("--images", type=int, default=2048, help="of all but `stream`")
    runs = ["processes:1", "processes:2", "ray:1", "ray:2"]
    parser.add_argument("--runs", nargs="+", default=runs, help="of `engines`: ENGINE:PROCESSES, in turn")
    parser.add_argument(
        "--kill", action="store_true", help="of `engines`: the last run again, a worker killed halfway"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of `stream`: training steps to time")
    args = parser.parse_args(arguments)
    for name in {"scaling": ("processor",), "stream": ("processor", "tokens")}.get(args.case, ()):
        if getattr(args, name) is None:
            parser.error(f"--{name} is missing, which `{args.case}` needs")
    for name in ("images", "rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: it must be at least 1")
    if args.kill and not args.runs[-1].startswith("ray:"):
        parser.error(f"--kill: the last of --runs is {args.runs[-1]!r}, and only Ray goes on without a worker")
    return args


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
    ratio = statistics.median(one / two for one, two in zip(seconds[1], seconds[2]))
    return {"pictures": args.images, "seconds": seconds, "one_over_two": ratio}


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


def distinct_images(folder: Path, number: int) -> dict:
    """A source of so many images of 64 pixels, coarse noise under a disc, no two of them the same."""
    features = Features({"image": Image(), "label": Value("string")})
    random = np.random.default_rng(0)
    with pq.ParquetWriter(folder / "train.parquet", features.arrow_schema) as writer:
        for start in range(0, number, 1024):
            rows = [distinct_row(random, index) for index in range(start, min(start + 1024, number))]
            writer.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema))
    fields = {"data": str(folder / "train.parquet"), "image": "image", "text": "label", "held_out": 0}
    return {"pictures": fields}


def distinct_row(random: np.random.Generator, index: int) -> dict:
    noise = PIL.Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((64, 64), 0)
    x, y, radius = random.integers(8, 56), random.integers(8, 56), random.integers(4, 24)
    colour = tuple(int(value) for value in random.integers(0, 256, 3))
    PIL.ImageDraw.Draw(noise).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    buffer = BytesIO()
    noise.save(buffer, format="PNG", compress_level=1)
    return {"image": {"bytes": buffer.getvalue(), "path": None}, "label": f"disc {index}"}


def measure_engines(args: argparse.Namespace) -> dict:
    """Seconds, rate and memory of the whole command by each engine, and what a killed worker costs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor = args.processor or small_processor(folder / "processor")
        began = time.perf_counter()
        recipe = folder / "recipe.json"
        recipe.write_text(json.dumps({"sources": distinct_images(folder, args.images)}))
        report = {"pictures": args.images, "seconds_to_make_them": time.perf_counter() - began, "runs": []}
        kills = [*[False] * len(args.runs) * args.rounds, *[True] * args.kill]
        for kill, run in zip(kills, [*args.runs * args.rounds, args.runs[-1]]):
            # the libraries' caches, and the tokens, are new in every run
            with tempfile.TemporaryDirectory(dir=folder) as place:
                report["runs"].append(EngineRun(run, recipe, processor, Path(place)).measure(kill))
            # a run takes minutes
            print(json.dumps(report["runs"][-1]), file=sys.stderr, flush=True)
    report["equal"] = len({run["tokens_sha256"] for run in report["runs"]}) == 1
    return report


class EngineRun:
    """One run of `moma tokenize`, watched from outside."""

    def __init__(self, run: str, recipe: Path, processor: str, place: Path):
        self.run, self.place, self.output = run, place, place / "tokens"
        engine, _, processes = run.partition(":")
        given = [sys.executable, "-m", "modeling_moma", "tokenize", str(recipe), "--processor", processor]
        self.command = [*given, "--output", str(self.output), "--engine", engine, "--processes", processes]

    def measure(self, kill: bool) -> dict:
        samples, killed, began = [], None, time.perf_counter()
        process = subprocess.Popen(
            self.command,
            env={**os.environ, "HF_HOME": str(self.place / "cache")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            done = self.reports()
            tree = {child: mib_of(child) for child in family(process)}
            writing = [mib for child, mib in tree.items() if self.is_writer(child)]
            samples.append((time.perf_counter() - began, len(done), sum(tree.values()), max(writing, default=0.0)))
            if kill and killed is None and len(done) >= self.shards() / 2 > 0:
                killed = self.kill_one(process)
            time.sleep(0.5)
        if process.returncode:
            raise RuntimeError(f"{' '.join(self.command)}: status {process.returncode}")
        seconds = time.perf_counter() - began
        report = {"run": self.run, "seconds": seconds, "shards": self.shards(), **self.rate(samples, seconds)}
        report |= {
            "mib_at_quarters": self.quarters(samples, 2),
            "mib_of_a_writer_at_quarters": self.quarters(samples, 3),
        }
        if killed is not None:
            lost, done, inodes = killed
            # a file that is renamed stays the same one, and one that is written again is another
            again = [name for name, inode in inodes.items() if (self.output / name).stat().st_ino != inode]
            again += [str(path) for path, moment in done.items() if path.stat().st_mtime_ns != moment]
            report["killed"] = {"shard": lost, "done_before": len(done), "others_written_again": again}
        digest = hashlib.sha256()
        for path in sorted(self.output.rglob("*.arrow")):
            if not path.name.endswith(LEFT_OVER):
                digest.update(path.name.encode() + path.read_bytes())
        return {**report, "tokens_sha256": digest.hexdigest()[:16]}

    def is_writer(self, process: psutil.Process) -> bool:
        """Whether a process writes shards, and does not only serve those that do; Ray names its own by it."""
        try:
            name = process.name()
        except psutil.Error:
            return False
        return not self.run.startswith("ray") or (name.startswith("ray::") and "Agent" not in name)

    def reports(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self.output.glob("*/*.json")}

    def shards(self) -> int:
        return len(read_job(self.output).tasks()) if (self.output / "job.json").is_file() else 0

    def rate(self, samples: list[tuple], seconds: float) -> dict:
        """Images per second once a tenth of the shards is done: how long an engine takes to start is left out."""
        began, done = next((sample[0], sample[1]) for sample in samples if sample[1] >= self.shards() / 10)
        if done == self.shards():
            # too few for that
            began, done = 0.0, 0
        images = sum(json.loads(path.read_text())["images"] for path in self.reports())
        return {"images_per_second": (1 - done / self.shards()) * images / (seconds - began)}

    def quarters(self, samples: list[tuple], column: int) -> list[int]:
        """Medians of a column just before 25, 50, 75 and 100 % of the shards are done."""
        shares = [(sample[1] / self.shards(), sample[column]) for sample in samples]
        near = [[mib for share, mib in shares if end - 0.1 <= share <= end] for end in (0.25, 0.5, 0.75, 1.0)]
        return [round(statistics.median(values)) if values else 0 for values in near]

    def kill_one(self, process: subprocess.Popen) -> tuple | None:
        """Kill a process in the middle of a shard; return its shard, what was done by then, and what others write."""
        begun = [(child, file) for child in family(process)[1:] for file in files_begun(child)]
        if not begun:
            return None
        (child, lost), *others = begun
        # it must not end the shard meanwhile
        child.suspend()
        if not lost.exists():
            child.resume()
            return None
        child.kill()
        names = {f"{file.parent.name}/{file.name[1:].partition('.arrow')[0]}.arrow": file for _, file in others}
        inodes = {name: file.stat().st_ino for name, file in names.items() if file.exists()}
        return lost.name, self.reports(), inodes


def family(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        own = psutil.Process(process.pid)
        return [own, *own.children(recursive=True)]
    except psutil.Error:
        return []


def mib_of(process: psutil.Process) -> float:
    try:
        return anonymous_bytes(process) / 2**20
    except (psutil.Error, OSError, StopIteration):
        return 0.0


def files_begun(process: psutil.Process) -> list[Path]:
    try:
        files = [Path(file.path) for file in process.open_files()]
    except psutil.Error:
        return []
    return [file for file in files if ".arrow." in file.name and file.name.endswith(LEFT_OVER)]


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
    """Print and return what was measured; ends with status 1 where engines wrote other tokens."""
    args = parse_arguments(None if arguments is None else list(arguments))
    measures = {
        "scaling": measure_scaling,
        "memory": measure_memory,
        "engines": measure_engines,
        "stream": measure_stream,
    }
    report = measures[args.case](args)
    print(json.dumps(report, indent=2))
    if report.get("equal") is False:
        sys.exit("the engines wrote other tokens than one another")
    return report


if __name__ == "__main__":
    main()
