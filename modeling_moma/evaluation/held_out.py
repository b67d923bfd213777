# SPDX-License-Identifier: Apache-2.0
"""What measures are taken on: held-out documents and captioned images of a source that `moma tokenize` wrote."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from tokenization import MomaProcessor

from ..data.documents import open_documents, shuffled_held_out
from ..data.images import SkippedRow, image_file, read_image
from ..data.jobs import JOB_FILE, read_job
from ..data.kinds import CaptionDocuments
from ..data.sources import TRAIN, undecoded_rows
from ..errors_moma import InputError


# images that are decoded at once
IMAGE_BATCH = 64

logger = logging.get_logger(__name__)


@dataclass
class CaptionedImages:
    """Held-out images with a caption each.

    Args:
        codes (`torch.Tensor`):
            the images as they are, `[N, image_seq_length]`.
        captions (`list[str]`):
            `[N]`, what each image is called.
        images (`Iterable[torch.Tensor]`, *optional*):
            batches of pixel values `[B, 3, H, W]` in [-1, 1], in the order of `codes`; without them what the image
            tokenizer makes of the codes stands for the real images.

    Raises:
        ValueError: codes and captions are of different number, or codes are no table.
    """

    codes: torch.Tensor
    captions: list[str]
    images: Iterable[torch.Tensor] | None = None

    def __post_init__(self):
        if self.codes.ndim != 2:
            raise InputError(f"`codes` has the shape {tuple(self.codes.shape)}: one row of codes for each image.")
        if len(self.codes) != len(self.captions):
            raise InputError(f"`codes` has {len(self.codes)} rows, but there are {len(self.captions)} captions.")

    def __len__(self) -> int:
        return len(self.captions)


@dataclass
class HeldOutSource:
    """The held-out part of one source."""

    documents: Sequence[dict]
    captioned: CaptionedImages | None = None


def read_held_out(
    folder: str,
    processor: MomaProcessor,
    split: str,
    limit: int | None = None,
    seed: int = 0,
    sources: Sequence[str] | None = None,
) -> dict[str, HeldOutSource]:
    """Return held-out documents, and captioned images where there are any, by source."""
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: it must be at least 1.")
    found = {entry.name: entry for entry in open_documents(folder, processor, split)}
    unknown = [name for name in sources or () if name not in found]
    if unknown:
        raise InputError(f"--sources {unknown[0]!r}: with a split {split!r} {folder!r} has {list(found)}.")
    result = {}
    for name in sources or found:
        documents, captioned = found[name], None
        if isinstance(documents, CaptionDocuments):
            rows = np.random.default_rng(seed).permutation(len(documents))[:limit].tolist()
            codes = torch.as_tensor(np.stack([documents.codes(row) for row in rows]))
            captions = [documents.caption(row) for row in rows]
            captioned = CaptionedImages(codes, captions, real_images(folder, processor, documents, split, rows))
        result[name] = HeldOutSource(shuffled_held_out([documents], seed, limit), captioned)
    return result


def real_images(
    folder: str, processor: MomaProcessor, documents: CaptionDocuments, split: str, rows: Sequence[int]
) -> Iterator[torch.Tensor] | None:
    """Return pixel values `[B, 3, H, W]` of rows, from where they were tokenized.

    It is `None` where the data cannot be opened any more, have changed, or were streamed, so that rows have no number.
    """
    if not (Path(folder) / JOB_FILE).is_file():
        return None
    job = read_job(folder)
    plans = job.splits[documents.name]
    plan = plans.get(split, plans[TRAIN])
    source = job.source(documents.name)
    if plan["rows"] is None:
        return None
    numbers = [documents.row_number(row) for row in rows]

    def values(numbers: Sequence[int]) -> Iterator[Any]:
        rows_there = undecoded_rows(opened.select(numbers))  # pyright: ignore[reportAttributeAccessIssue]
        return (value for row in rows_there for value in source.kind.row_images(row))

    try:
        opened = source.open(plan["split"])
        size = (job.file_sizes or {}).get(documents.name)
        if len(opened) != plan["rows"] or size not in (None, opened.info.download_size):  # pyright: ignore[reportArgumentType]
            raise InputError(f"{source.data!r} has changed since it was tokenized")
        for value in values(numbers[:1]):
            read_image(value, source.image_root())
            # all of a column are files, or none is; those that the rows hold themselves are there
            if image_file(value, source.image_root()) is not None:
                _check_files(values(numbers), source.image_root())
    except ValueError as error:
        logger.warning(f"Reconstructions stand in for the images of {documents.name!r}: {error}")
        return None
    named = zip((f"{source.name!r}, row {number}" for number in numbers), values(numbers), strict=True)
    return _pixel_batches(processor, named, source.image_root())


def _check_files(values: Iterable[Any], root: str) -> None:
    """Raise [`SkippedRow`] for the first of the images that is a file and is not there."""
    for value in values:
        path = image_file(value, root)
        if path is not None and not path.is_file():
            raise SkippedRow("image missing", f"there is no file {str(path)!r}")


def _pixel_batches(processor: MomaProcessor, values: Iterable[tuple[str, Any]], root: str) -> Iterator[torch.Tensor]:
    values = iter(values)
    while part := list(islice(values, IMAGE_BATCH)):
        pixels = []
        for name, value in part:
            try:
                image, _ = read_image(value, root)
            except SkippedRow as error:
                raise InputError(f"{name}: {error}; it was tokenized, so its file has changed since.") from error
            pixels.append(processor.image_processor([image], return_tensors="pt")["pixel_values"])
        yield torch.cat(pixels)
