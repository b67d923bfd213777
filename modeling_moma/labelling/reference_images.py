# SPDX-License-Identifier: Apache-2.0
"""A memory from a data set of named images: which of its rows are kept, and what a model makes of them."""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..data.images import SkippedRow, read_image
from ..data.kinds import ImageKind
from ..data.kinds.base import as_text, is_something
from ..data.sources import TRAIN, Source, undecoded_rows
from ..errors_moma import InputError
from ..utils.messages import one_line
from .labeler import ImageLabeler
from .memory import ImageMemory


# rows that cannot be used, of which each is told; of more their number
MOST_TOLD = 20


@dataclass(frozen=True)
class NamedImages(ImageKind):
    """Images with names, as a memory is made of."""

    label: str = "name"
    tags: str | None = None
    group: str | None = None

    def columns(self) -> list[str]:
        """Return the columns that are read, the image's first."""
        return [name for name in (self.image, self.label, self.tags, self.group) if name is not None]

    def row_name(self, row: dict[str, Any]) -> str:
        """Return the name of a row, `""` where it has none."""
        return _words(self.label, row[self.label])

    def row_tags(self, row: dict[str, Any]) -> list[str]:
        """Return the tags of a row."""
        value = row[self.tags] if self.tags is not None else None
        found = value if isinstance(value, list) else _words(self.tags or "", value).split(",")
        return [text for entry in found if (text := _words(self.tags or "", entry))]


def build_memory(
    source: Source,
    labeler: ImageLabeler,
    least_groups: int = 1,
    most: int = 24,
    dimensions: int = 64,
    known: ImageMemory | None = None,
) -> ImageMemory:
    """Keep the named images of a data set's training rows.

    Of each name and group one image is kept, the first, and of every name the tags of all its rows, whether or not any
    image of it is. Images that cannot be read, and how many rows have no name, are told on the standard error.
    """
    kind = source.kind
    if not isinstance(kind, NamedImages):
        raise InputError(f"the source is one of {type(kind).__name__}: give one of NamedImages.")
    if least_groups > 1 and kind.group is None:
        raise InputError(f"least_groups is {least_groups}, and there is no column of groups: name it.")
    rows = source.open(source.split_names()[TRAIN])
    # one column may be both, such as name and tag, and `datasets` selects none twice
    columns = list(dict.fromkeys(kind.columns()[1:]))
    texts = rows.select_columns(columns)
    chosen = chosen_rows(undecoded_rows(texts), kind, least_groups, most)
    if not chosen:
        raise InputError(
            f"{source.data!r}: none of its rows is kept: none has a name in {kind.label!r} that {least_groups} groups "
            "have."
        )
    names, tags, features, left_out = [], [], [], Counter[str]()
    following = iter(tqdm(_selected(rows, chosen), total=len(chosen), desc="known images", disable=None))
    while batch := list(islice(following, labeler.batch_size)):
        pixels = []
        for number, row in batch:
            try:
                image = read_image(row[kind.image], source.image_root(), kind.min_side)[0]
            except SkippedRow as error:
                left_out[error.reason] += 1
                if left_out.total() <= MOST_TOLD:
                    tqdm.write(f"row {number}: left out: {one_line(error, 200)}", file=sys.stderr)
                continue
            pixels.append(labeler.pixel_values(image))
            names.append(kind.row_name(row))
            tags.append(kind.row_tags(row))
        if pixels:
            features.append(labeler.features(labeler.encode_pixels(torch.cat(pixels))))
    if left_out.total() > MOST_TOLD:
        print(f"{left_out.total()} rows left out: {dict(left_out)}", file=sys.stderr)
    if not names:
        raise InputError(f"{source.data!r}: none of the {len(chosen)} images that would be kept can be read.")
    if known is not None:
        memory = known.extended(torch.cat(features), names, tags)
    else:
        memory = ImageMemory.build(torch.cat(features), names, tags, *labeler.probe(), dimensions=dimensions)
    # without a column of tags the rows need not be read once more
    return memory if kind.tags is None else memory.with_tags(tags_of_names(undecoded_rows(texts), kind))


def chosen_rows(rows: Iterator[dict[str, Any]], kind: NamedImages, least_groups: int, most: int) -> list[int]:
    """Return the numbers of the rows that are kept, see [`build_memory`]."""
    groups: dict[str, set[str | int]] = defaultdict(set)
    kept: dict[str, list[int]] = defaultdict(list)
    nameless = 0
    for number, row in enumerate(rows):
        if not (name := kind.row_name(row)):
            nameless += 1
            continue
        # without groups every image is one
        group = number if kind.group is None else _words(kind.group, row[kind.group])
        if group not in groups[name]:
            groups[name].add(group)
            kept[name].append(number)
    if nameless:
        print(f"left out: {nameless} of {number + 1} rows, which have no name in {kind.label!r}", file=sys.stderr)
    return sorted(
        number for name, found in kept.items() if len(groups[name]) >= least_groups for number in found[:most]
    )


def tags_of_names(rows: Iterable[dict[str, Any]], kind: NamedImages) -> dict[str, list[str]]:
    """Return the tags of each name that has any, the most frequent first."""
    counted = defaultdict(Counter[str])
    for row in rows:
        if name := kind.row_name(row):
            counted[name].update(list(dict.fromkeys(kind.row_tags(row))))
    return {name: [tag for tag, _ in counts.most_common()] for name, counts in sorted(counted.items()) if counts}


def _selected(rows: Any, numbers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield chosen rows with their numbers, their images not decoded."""
    if isinstance(rows, Dataset):
        yield from zip(numbers, undecoded_rows(rows.select(numbers)), strict=True)
        return
    wanted = set(numbers)
    for number, row in enumerate(undecoded_rows(rows)):
        if number in wanted:
            yield number, row


def _words(column: str, value: Any) -> str:
    return " ".join(as_text(column, value).split()) if is_something(value) else ""
