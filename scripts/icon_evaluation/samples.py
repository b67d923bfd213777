# SPDX-License-Identifier: Apache-2.0
"""What a model is measured on: held-out icons chosen by hashes, and training icons to compare them with."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from tqdm.auto import tqdm

from modeling_moma.data.kinds import ImageKind
from modeling_moma.data.sources import Source
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.drawings import all_features
from modeling_moma.evaluation.measures import encode_images, image_batches
from modeling_moma.training.image_store import ArrayWriter, read_array
from modeling_moma.utils.atomic_files import atomic_write


TRAIN = "train"
HELD_OUT = ("validation", "test", "test_family", "test_words", "test_pairs")
# the split of the figures in the metadata of the card, whose icons are drawn
MAIN = "test"
# neighbours of an image that are kept: many are of one name
KEPT = 50
# features that are compared at once
CHUNK = 16_384
# pixel values `[B, 3, H, W]` in [-1, 1] to features `[B, D]`
Extract = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sample:
    """Some icons of a split: their columns but for images, batches of pixel values, codes and features."""

    split: str
    rows: list[dict]
    images: list[torch.Tensor]
    codes: torch.Tensor
    features: torch.Tensor


@dataclass(frozen=True)
class TrainIcons:
    """Icons to train on: `set`, `icon`, `name`, `family`, `keywords` of all, and features `[F, D]` of some, `rows`."""

    columns: dict[str, list]
    features: np.ndarray
    rows: np.ndarray

    def row(self, number: int) -> dict:
        """The columns of one icon."""
        return {name: values[number] for name, values in self.columns.items()}


def order(*parts: str) -> str:
    """What sorts things at random, and the same way every time: a hash, apart from those of the data set."""
    return hashlib.sha256("/".join(("evaluation", *parts)).encode()).hexdigest()


def in_order(sets: Sequence[str], icons: Sequence[str]) -> list[int]:
    """The places of icons in the order of their hashes."""
    return sorted(range(len(sets)), key=lambda place: order(sets[place], icons[place]))


def caption(row: dict, with_colour: bool = False) -> str:
    """What an icon is called in training, as `house (tabler, filled)` or `house (tabler, filled, red)`."""
    # icons in colours of their own have none
    parts = [row["style"], row["colour"]] if with_colour and row["colour"] else [row["style"]]
    return f"{row['name']} ({', '.join(parts)})"


def open_split(data: str, split: str, option: str = "--data") -> Dataset:
    """Opens a split of a folder, which `option` named."""
    if not Path(data).is_dir():
        raise InputError(f"{option} {data!r} is no folder: `make data` builds icons and emoji.")
    # `load_dataset` alone may give the sample of the icons, prepared before `make data` built all
    source = Source(name=option.strip("-"), data=data, kind=ImageKind("image"))
    # the data set's own names: a single split is any source's `train`
    splits = set(source.split_names().values())
    if split not in splits:
        raise InputError(f"{option} {data!r} has no split {split!r}, but {sorted(splits)}.")
    return source.open(split)  # pyright: ignore[reportReturnType]


def without_images(rows: Dataset) -> list[dict]:
    """The columns of icons but for their images, which are not decoded."""
    return rows.remove_columns("image").to_list()


def take_sample(
    data: str,
    split: str,
    limit: int,
    processor,
    extract: Extract,
    batch_size: int,
    is_taken: Callable[[dict], bool] = lambda row: True,
) -> Sample:
    """Reads so many icons of a split that are to be taken, codes them and computes their features."""
    opened = open_split(data, split)
    rows = without_images(opened)
    ordered = in_order([row["set"] for row in rows], [row["icon"] for row in rows])
    places = [place for place in ordered if is_taken(rows[place])][:limit]
    if len(places) < 2:
        raise InputError(f"--data {data!r}: {len(places)} icons of {split!r} can be measured, and 2 are needed.")
    images = list(image_batches(opened.select(places), processor, batch_size, f"images of {split}"))
    return Sample(
        split=split,
        rows=[rows[place] for place in places],
        images=images,
        codes=encode_images(processor, iter(images)),
        features=all_features(extract, images),
    )


def read_train_icons(
    train: Dataset, processor, extract: Extract, batch_size: int, limit: int | None = None, file: str | None = None
) -> TrainIcons:
    """
    Opens training icons with the features of the first `limit` by hash, some 2 ms each.

    They are kept in `file`, where it is given, and found again there.
    """
    columns = train.select_columns(["set", "icon", "name", "family", "keywords"]).to_dict()
    rows = np.sort(np.asarray(in_order(columns["set"], columns["icon"])[:limit]))

    def batches():
        images = image_batches(train.select(rows), processor, batch_size, "features of training images")
        return (extract(batch).cpu().numpy() for batch in images)

    if file is None:
        return TrainIcons(columns, np.concatenate(list(batches())), rows)

    def write(path: Path) -> None:
        found = batches()
        first = next(found)
        with ArrayWriter(path, first.shape[1:], np.float32) as writer:
            writer.extend(first)
            for features in found:
                writer.extend(features)

    if not Path(file).is_file():
        atomic_write(file, write)
    features = read_array(Path(file))
    if len(features) != len(rows):
        raise InputError(
            f"--features {file!r} has those of {len(features)} images, and {len(rows)} are asked for: they are of "
            "other data; name a new file."
        )
    return TrainIcons(columns, features, rows)


def nearest(train: TrainIcons, features: torch.Tensor, families: Sequence[str], kept: int = KEPT) -> list[list[dict]]:
    """
    Finds the training images of other families that are most similar to images, by the cosine of their features.

    `features` are `[N, D]`, `families` those of the images; the rows of each image's neighbours come nearest first.
    """
    number = {name: place for place, name in enumerate({*train.columns["family"], *families})}
    family_F = torch.tensor([number[train.columns["family"][row]] for row in train.rows.tolist()])
    family_N = torch.tensor([number[name] for name in families])
    wanted_ND = F.normalize(features.float(), dim=1)
    best_NK = torch.full((len(wanted_ND), 0), -torch.inf)
    place_NK = torch.zeros((len(wanted_ND), 0), dtype=torch.long)
    for start in tqdm(range(0, len(train.features), CHUNK), desc="nearest neighbours"):
        chunk_CD = F.normalize(torch.from_numpy(np.array(train.features[start : start + CHUNK])).float(), dim=1)
        is_own_NC = family_N[:, None] == family_F[None, start : start + CHUNK]
        score_NC = (wanted_ND @ chunk_CD.T).masked_fill(is_own_NC, -torch.inf)
        place_C = torch.arange(start, start + len(chunk_CD)).expand(len(wanted_ND), -1)
        score_NC = torch.cat([best_NK, score_NC], dim=1)
        best_NK, order_NK = score_NC.topk(min(kept, score_NC.shape[1]), dim=1)
        place_NK = torch.cat([place_NK, place_C], dim=1).gather(1, order_NK)
    return [
        [train.row(int(train.rows[place])) for place, score in zip(places, scores) if score > -torch.inf]
        for places, scores in zip(place_NK.tolist(), best_NK.tolist())
    ]
