# SPDX-License-Identifier: Apache-2.0
"""The held-out icons that a model is measured on: so many of a split, chosen by hashes, with captions and codes."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset

from icons_recipe.names import words
from modeling_moma.data.kinds import ImageKind
from modeling_moma.data.sources import Source
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.drawings import all_features
from modeling_moma.evaluation.measures import encode_images, image_batches


TRAIN = "train"
HELD_OUT = ("validation", "test", "test_family", "test_words", "test_pairs")


@dataclass(frozen=True)
class Sample:
    """Some icons of a held-out split.

    Args:
        split: its name.
        rows: the columns of each icon but for its image. N of them, in the order of their hashes.
        images: batches of their pixel values, `[B, 3, H, W]` in [-1, 1].
        codes: of the images, `[N, image_seq_length]`.
        features: of the images, `[N, D]`.
        names: the different names of all icons of the split, whether they are in the sample or not.
    """

    split: str
    rows: list[dict]
    images: list[torch.Tensor]
    codes: torch.Tensor
    features: torch.Tensor
    names: list[str]


def normalised(text: str) -> str:
    """Returns a text in lower case, its words apart by single spaces and nothing else."""
    return " ".join(words(text))


def order(*parts: str) -> str:
    """Returns what sorts things at random, and the same way every time: a hash, apart from those of the data set."""
    return hashlib.sha256("/".join(("evaluation", *parts)).encode()).hexdigest()


def caption(row: dict, with_colour: bool = False) -> str:
    """Returns what an icon is called in training, as `house (tabler, filled)` or `house (tabler, filled, red)`."""
    parts = [row["style"]]
    # icons in colours of their own have none
    if with_colour and row["colour"]:
        parts.append(row["colour"])
    return f"{row['name']} ({', '.join(parts)})"


def open_split(data: str, split: str, option: str = "--data") -> Dataset:
    """
    Opens a split of a data set.

    Args:
        data: its folder.
        split: `train`, or one of `HELD_OUT`.
        option: that names the folder, for errors.

    Raises:
        InputError: there is no such folder or split.
    """
    if not Path(data).is_dir():
        raise InputError(f"{option} {data!r} is no folder: `make data` builds icons and emoji.")
    # `load_dataset` alone may give the sample of the icons, prepared before `make data` built all
    source = Source(name=option.strip("-"), data=data, kind=ImageKind("image"))
    # the data set's own names: a single split is any source's `train`
    splits = set(source.split_names().values())
    if split not in splits:
        raise InputError(f"{option} {data!r} has no split {split!r}, but {sorted(splits)}.")
    return source.open(split)  # pyright: ignore[reportReturnType]


def read_emoji(data: str, processor, batch_size: int) -> tuple[list[dict], torch.Tensor]:
    """
    Reads the emoji of the split `test` of their data set as icons, and codes them.

    Args:
        data: folder of the data set.
        processor: a `MomaProcessor`.
        batch_size: images at once.

    Returns:
        `name` and `aliases` (none) of each of N emoji, and the codes of their images, `[N, image_seq_length]`.

    Raises:
        InputError: there is no such folder or split.
    """
    opened = open_split(data, "test", "--emoji")
    rows = [{"name": row["label"], "aliases": []} for row in without_images(opened)]
    return rows, encode_images(processor, image_batches(opened, processor, batch_size, "images of emoji"))


def without_images(rows: Dataset) -> list[dict]:
    """Returns the columns of icons but for their images, which are not decoded."""
    return rows.remove_columns("image").to_list()


def in_order(rows: Sequence[dict]) -> list[int]:
    """Returns the places of rows in the order of their hashes."""
    return sorted(range(len(rows)), key=lambda place: order(rows[place]["set"], rows[place]["icon"]))


def lone_icons(columns: Mapping[str, Sequence[str]], train: Mapping[str, Sequence[str]]) -> Callable[[dict], bool]:
    """
    Returns what tells the icons that are their family's only ones of their name, which another family of the training
    draws too: whether they were trained on or held out, the training has no other size or style of them.

    Args:
        columns: `name` and `family` of all icons of a split.
        train: the same of the training icons.
    """
    numbers = Counter(zip(columns["family"], map(normalised, columns["name"]), strict=True))
    families = defaultdict(set)
    for family, name in zip(train["family"], map(normalised, train["name"]), strict=True):
        families[name].add(family)

    def is_lone(row: dict) -> bool:
        family, name = row["family"], normalised(row["name"])
        return numbers[family, name] == 1 and bool(families[name] - {family})

    return is_lone


def take_sample(
    data: str,
    split: str,
    limit: int,
    processor,
    extract: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
    is_taken: Callable[[dict], bool] = lambda row: True,
) -> Sample:
    """
    Reads icons of a split, codes them and computes their features.

    Args:
        data: folder of the data set.
        split: `TRAIN`, or one of `HELD_OUT`.
        limit: icons at most, at least 2.
        processor: a `MomaProcessor`.
        extract: pixel values `[B, 3, H, W]` in [-1, 1] to features `[B, D]`.
        batch_size: images at once.
        is_taken: says of an icon's columns whether it is taken; all are by default.

    Raises:
        InputError: there is no such folder or split, or there are fewer than two such icons in it.
    """
    opened = open_split(data, split)
    rows = without_images(opened)
    places = [place for place in in_order(rows) if is_taken(rows[place])][:limit]
    if len(places) < 2:
        raise InputError(f"--data {data!r}: {len(places)} icons of {split!r} can be measured, and 2 are needed.")
    images = list(image_batches(opened.select(places), processor, batch_size, f"images of {split}"))
    codes, features = encode_images(processor, iter(images)), all_features(extract, images)
    return Sample(
        split,
        [rows[place] for place in places],
        images,
        codes,
        features,
        sorted({normalised(row["name"]) for row in rows}),
    )
