# SPDX-License-Identifier: Apache-2.0
"""The images of a recipe's sources, decoded and resized once, in files of which only what is used is read."""

import heapq
import json
import os
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm.auto import tqdm

from tokenization import MomaImageProcessor

from ..data.images import SkippedRow, read_image
from ..data.jobs import source_digest
from ..data.kinds import ImageKind
from ..data.sources import HELD_OUT_RULE, TRAIN, VALIDATION, Source, placed_rows, row_place
from ..errors_moma import InputError
from ..utils.atomic_files import replace_folder
from .recipe import read_recipe


RECIPES = (".yaml", ".yml")
# a recipe in JSON has no more bytes: data in JSON may have any number
JSON_RECIPE_BYTES = 1 << 20
# the column of a data set that stands in for a recipe
IMAGE_COLUMN = "image"
# fields of a source that change no image
OF_TEXTS = ("weight", "text", "alternatives", "image_first", "without_caption", "codings")


@dataclass(frozen=True)
class Candidate:
    """An image before it is decoded."""

    source: Source
    split: str
    row: int
    index: int
    is_held_out: bool
    value: Any

    def place(self) -> str:
        """Return where it stands, for errors and reports."""
        return f"source {self.source.name!r}, split {self.split!r}, row {self.row}, image {self.index}"


def read_image_sources(place: str, changes: Sequence[str] = ()) -> tuple[list[Source], dict[str, Any]]:
    """Return the sources with images that a recipe names, and its settings of the image tokenizer."""
    if not _is_recipe(Path(place)):
        settings = read_recipe(None, (), changes, ("image_tokenizer",)).image_tokenizer
        return [Source(name="images", data=place, kind=ImageKind(IMAGE_COLUMN))], settings
    recipe = read_recipe(place, (), changes, ("image_tokenizer", "processor", "sources"))
    sources = [source for source in recipe.sources if source.kind.has_images]
    if not sources:
        kinds = {source.name: source.kind.name for source in recipe.sources}
        raise InputError(
            f"{place!r} has no source with images, but {kinds or 'no sources at all'}: an image tokenizer is "
            "trained on sources of captions (`image`) or of interleaved documents (`segments`, `images`)."
        )
    of_processor = {"do_pad": True} if recipe.processor.do_pad else {}
    return sources, of_processor | recipe.image_tokenizer


def _is_recipe(path: Path) -> bool:
    """Return whether a file is a recipe, and not rows of data."""
    if path.suffix != ".json":
        return path.suffix in RECIPES
    if not path.is_file() or path.stat().st_size > JSON_RECIPE_BYTES:
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # lines of JSON, or nothing that can be read
    except ValueError:
        return False
    return isinstance(content, dict) and isinstance(content.get("sources"), dict)


def image_fields(source: Source) -> dict[str, Any]:
    """Return what decides on which images a source gives, for a comparison with those of an earlier start."""
    fields = {"name": source.name, "kind": source.kind.name, **source.fields()}
    # by which rows are held out
    if source.held_out:
        fields["held_out_rule"] = HELD_OUT_RULE
    if source.load.get("streaming"):
        fields["places"] = row_place(0, 0)
    return {name: value for name, value in fields.items() if name not in OF_TEXTS}


def candidates(source: Source) -> Iterator[Candidate]:
    """Yield a source's images in their order, first those of its split `train`.

    Held out are those of its split `validation` or, where it has none, of the rows that [`Source.is_held_out`] names.
    """
    names = source.split_names()
    for name in (TRAIN, VALIDATION):
        if name not in names:
            continue
        rows = source.open(names[name])
        for row, (place, columns) in enumerate(placed_rows(rows)):
            is_held_out = name == VALIDATION or (VALIDATION not in names and source.is_held_out(place))
            for index, value in enumerate(source.kind.row_images(columns)):
                yield Candidate(source, names[name], row, index, is_held_out, value)


class ArrayWriter:
    """A `.npy` file that is written entry by entry, so that memory holds one of them at a time."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type = np.uint8):
        self.shape, self.dtype, self.count = shape, np.dtype(dtype), 0
        self._file: BinaryIO = open(path, "wb")
        self._write_header()
        self._start = self._file.tell()
        self._bytes = self.dtype.itemsize * int(np.prod(shape))

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, *error) -> None:
        """Write how many entries there are, and close the file."""
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._start:
            raise RuntimeError(f"numpy left no room for the number of entries ({self.count}) in the file's header.")
        self._file.close()

    def write(self, entry: np.ndarray, index: int | None = None) -> None:
        """Append an entry, or replace that of an index."""
        place = self.count if index is None else index
        self._file.seek(self._start + place * self._bytes)
        self._file.write(np.ascontiguousarray(entry, dtype=self.dtype).tobytes())
        self.count = max(self.count, place + 1)

    def extend(self, entries: np.ndarray) -> None:
        """Append several entries, `(entries, *shape)`."""
        self._file.seek(self._start + self.count * self._bytes)
        self._file.write(np.ascontiguousarray(entries, dtype=self.dtype).tobytes())
        self.count += len(entries)

    def drop_last(self) -> None:
        """Remove the last entry."""
        self.count -= 1
        self._file.truncate(self._start + self.count * self._bytes)

    def _write_header(self) -> None:
        # numpy pads it so that the first axis can grow
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.count, *self.shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


def read_array(path: Path) -> np.ndarray:
    """Return the array of a `.npy` file, of which only what is used is read from the disk."""
    # "c" and not "r": torch warns of arrays that it must not write to
    return np.load(path, mmap_mode="c")


def read_whole_array(path: Path, count: int) -> np.ndarray | None:
    """Return what [`read_array`] does, or `None` where the file is missing, damaged or of another length."""
    try:
        array = read_array(path)
    # an empty file, one that is cut short, or something else
    except (OSError, ValueError, EOFError):
        return None
    return array if len(array) == count else None


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
