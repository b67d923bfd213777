# SPDX-License-Identifier: Apache-2.0
"""Images decoded and resized once, in files that are read without being loaded: memory does not grow with them."""

import heapq
import json
import os
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from tokenization import MomaImageProcessor

from ..data.images import SkippedRow, read_image
from ..data.jobs import source_digest
from ..data.sources import Source
from ..errors_moma import InputError
from ..utils.atomic_files import replace_folder
from .array_file import ArrayWriter, read_whole_array
from .image_sources import Candidate, candidates, image_fields


TRAIN_FILE, HELD_OUT_FILE, REPORT_FILE = "train.npy", "held_out.npy", "images.json"
# source and row of each image to train on
PLACES_FILE = "places.npy"
# images left out that a report describes, beyond their counts
NUM_EXAMPLES = 20
# decoders let other threads run, and few are enough to keep the disk busy
NUM_READERS = min(16, os.cpu_count() or 1)


@dataclass(frozen=True)
class ImageStore:
    """The images of a training, as the processor shows them to the model."""

    folder: Path
    train: np.ndarray
    held_out: np.ndarray
    places: np.ndarray
    report: dict[str, Any]

    def summary(self) -> str:
        """Return how many images there are, and how many were left out and why."""
        lines = [f"{self.report['train']:,} images to train on, {self.report['held_out']:,} held out"]
        lines += [f"  {name}: {describe(counts)}" for name, counts in self.report["sources"].items()]
        return "\n".join(lines)


def open_store(
    folder: Path,
    sources: list[Source],
    side: int,
    held_out_images: int,
    is_strict: bool = False,
    do_pad: bool = False,
) -> ImageStore:
    """Open the images of an earlier start, or read the sources where these are others or its files are damaged."""
    key = {
        "sources": [image_fields(source) for source in sources],
        "files": [source_digest(source) for source in sources],
        "resolution": side,
        "held_out_images": held_out_images,
    }
    if do_pad:
        # without it the key stays what it was
        key["do_pad"] = True
    # compare the key as JSON gives it back
    key = json.loads(json.dumps(key, default=str))
    report = _read_report(folder)
    arrays = _read_arrays(folder, report) if report.get("key") == key else None
    if arrays is not None:
        print(f"images of an earlier start in {str(folder)!r}; remove the folder where the data have changed")
    else:
        replace_folder(folder, lambda aside: _write(aside, sources, key, is_strict))
        report = _read_report(folder)
        arrays = _read_arrays(folder, report)
        assert arrays is not None
    if is_strict and report["examples"]:
        raise InputError(f"--strict: {report['examples'][0]}.")
    return ImageStore(folder, *arrays, report)


def take(images: np.ndarray, indices: torch.Tensor) -> torch.Tensor:
    """Return the images of a store by their indices, in memory."""
    return torch.from_numpy(images[indices.numpy()])


def to_pixel_values(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Turn uint8 images `(batch, 3, side, side)` into values in [-1, 1], as the model takes them."""
    pixel_values = images.to(device).float() / 127.5 - 1
    return pixel_values.to(memory_format=torch.channels_last)


def describe(counts: dict[str, Any]) -> str:
    """Return a source's entry of a report in words."""
    text = f"{counts['train']:,} to train on, {counts['held_out']:,} held out"
    for title, name in (("left out", "left_out"), ("changed", "changed")):
        if counts[name]:
            text += f"; {title}: " + ", ".join(f"{reason} {count:,}" for reason, count in counts[name].items())
    return text


def _read_report(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / REPORT_FILE).read_text())
    except (OSError, ValueError):
        return {}


def _read_arrays(folder: Path, report: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the images and places of a store, or `None` where one of the files is not whole."""
    train, held_out, places = (
        read_whole_array(folder / name, report.get(count, 0))
        for name, count in ((TRAIN_FILE, "train"), (HELD_OUT_FILE, "held_out"), (PLACES_FILE, "train"))
    )
    return None if train is None or held_out is None or places is None else (train, held_out, places)


def _write(folder: Path, sources: list[Source], key: dict[str, Any], is_strict: bool) -> None:
    folder.mkdir(parents=True)
    side, do_pad = key["resolution"], key.get("do_pad", False)
    shape = (3, side, side)
    with (
        ArrayWriter(folder / TRAIN_FILE, shape) as train,
        ArrayWriter(folder / HELD_OUT_FILE, shape) as held_out,
        ArrayWriter(folder / PLACES_FILE, (2,), np.int64) as places,
    ):
        filling = _StoreWriter(sources, train, places, _Sample(held_out, key["held_out_images"]), is_strict)
        filling.run(MomaImageProcessor.for_resolution(side, do_pad=do_pad, do_rescale=False, do_normalize=False))
    totals = {"train": train.count, "held_out": held_out.count}
    report = {"key": key, **totals, "sources": filling.counts, "examples": filling.examples}
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")


class _Sample:
    """The held-out images: at most so many of all that are offered, drawn by a hash of where they stand."""

    def __init__(self, writer: ArrayWriter, limit: int):
        self.writer, self.limit = writer, limit
        # (-hash, index) of those in the file, the one to give way first
        self.heap: list[tuple[int, int]] = []
        # the source of each image
        self.owners: list[str] = []

    def wants(self, candidate: Candidate) -> bool:
        return len(self.heap) < self.limit or -_hash(candidate) > self.heap[0][0]

    def add(self, candidate: Candidate, image: np.ndarray) -> None:
        if not self.wants(candidate):
            return
        if len(self.heap) < self.limit:
            index = len(self.heap)
            heapq.heappush(self.heap, (-_hash(candidate), index))
            self.owners.append(candidate.source.name)
        else:
            index = self.heap[0][1]
            heapq.heapreplace(self.heap, (-_hash(candidate), index))
            self.owners[index] = candidate.source.name
        self.writer.write(image, index)


def _hash(candidate: Candidate) -> int:
    place = f"{candidate.source.name}/{candidate.split}/{candidate.row}/{candidate.index}"
    return zlib.crc32(place.encode())


class _StoreWriter:
    """Reads all images of the sources into the files, and counts what becomes of them."""

    def __init__(
        self, sources: list[Source], train: ArrayWriter, places: ArrayWriter, held_out: _Sample, is_strict: bool
    ):
        self.sources, self.train, self.held_out, self.is_strict = sources, train, held_out, is_strict
        self.places, self.numbers = places, {source.name: number for number, source in enumerate(sources)}
        self.counts: dict[str, dict[str, Any]] = {
            source.name: {"train": 0, "held_out": 0, "left_out": Counter(), "changed": Counter()} for source in sources
        }
        self.examples: list[str] = []
        self.last: tuple[Candidate, np.ndarray] | None = None

    def run(self, processor: MomaImageProcessor) -> None:
        wanted = (
            candidate
            for source in self.sources
            for candidate in candidates(source)
            if not candidate.is_held_out or self.held_out.wants(candidate)
        )
        for candidate, result in tqdm(
            _read_in_order(wanted, processor), desc="reading images", unit=" images", delay=1
        ):
            if isinstance(result, SkippedRow):
                self._leave_out(candidate, result)
            else:
                self._take(candidate, *result)
        if self.train.count > 1 and not self.held_out.owners:
            self._hold_last_out()
        for owner in self.held_out.owners:
            self.counts[owner]["held_out"] += 1
        if self.train.count == 0 or not self.held_out.owners:
            raise InputError(
                "sources: an image tokenizer needs one image to train on and another one that is held out, and of "
                + "; ".join(f"{name!r} there are {describe(counts)}" for name, counts in self.counts.items())
                + "."
            )

    def _take(self, candidate: Candidate, image: np.ndarray, changes: list[str]) -> None:
        self.counts[candidate.source.name]["changed"].update(changes)
        if candidate.is_held_out:
            self.held_out.add(candidate, image)
        else:
            self.train.write(image)
            self.places.write(np.array([self.numbers[candidate.source.name], candidate.row]))
            self.counts[candidate.source.name]["train"] += 1
            self.last = candidate, image

    def _leave_out(self, candidate: Candidate, error: SkippedRow) -> None:
        example = f"{candidate.place()}: {error}"
        if self.is_strict:
            raise InputError(f"--strict: {example}.") from error
        self.counts[candidate.source.name]["left_out"][error.reason] += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(example)

    def _hold_last_out(self) -> None:
        assert self.last is not None
        self.train.drop_last()
        self.places.drop_last()
        self.counts[self.last[0].source.name]["train"] -= 1
        self.held_out.add(*self.last)


def _read_in_order(
    wanted: Iterable[Candidate], processor: MomaImageProcessor
) -> Iterator[tuple[Candidate, tuple[np.ndarray, list[str]] | SkippedRow]]:
    """Decode images in several threads, few at a time, and yield them in their order."""
    waiting: deque = deque()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for candidate in wanted:
            waiting.append((candidate, pool.submit(_read, candidate, processor)))
            if len(waiting) > 2 * NUM_READERS:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()


def _read(candidate: Candidate, processor: MomaImageProcessor) -> tuple[np.ndarray, list[str]] | SkippedRow:
    source = candidate.source
    try:
        image, changes = read_image(candidate.value, source.image_root(), source.kind.min_side)
        pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    except SkippedRow as error:
        return error
    # an image that can be decoded may still have a mode that cannot be converted
    except (ValueError, TypeError, OSError) as error:
        return SkippedRow("image damaged", str(error))
    return pixels.to(torch.uint8).numpy(), changes
