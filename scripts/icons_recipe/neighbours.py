# SPDX-License-Identifier: Apache-2.0
"""What stands beside a model: the training images of other families that have the most similar ImageNet features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from tqdm.auto import tqdm

from icons_recipe.samples import normalised, order
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.measures import image_batches
from modeling_moma.training.array_file import ArrayWriter, read_array
from modeling_moma.utils.atomic_files import atomic_write


# neighbours of an image that are kept: many are of one name
KEPT = 50
# features that are compared at once
CHUNK = 16_384


@dataclass(frozen=True)
class TrainIcons:
    """Icons to train on, with features of some or all of them.

    Args:
        columns: of all icons: `set`, `icon`, `name`, `family` and `keywords`, a list each.
        features: `[F, D]`, perhaps on the disk.
        rows: the row of each feature's image, int64 `[F]`.
    """

    columns: dict[str, list]
    features: np.ndarray
    rows: np.ndarray

    def row(self, number: int) -> dict:
        """Returns the columns of one icon."""
        return {name: values[number] for name, values in self.columns.items()}


def train_columns(train: Dataset) -> dict[str, list]:
    """Returns the columns of the training icons that something is asked of."""
    return train.select_columns(["set", "icon", "name", "family", "keywords"]).to_dict()


def kept_features(
    path: str | Path,
    train: Dataset,
    columns: dict[str, list],
    processor,
    extract: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
) -> TrainIcons:
    """
    Opens the features of all training images, which are computed where the file is missing, some 2 ms each.

    Args:
        path: of the file, `.npy`.
        train: see `compute_features`, as the next four.
        columns: see there.
        processor: see there.
        extract: see there.
        batch_size: see there.

    Raises:
        InputError: they are of other images.
    """
    if not Path(path).is_file():
        atomic_write(path, lambda aside: _write_features(aside, train, processor, extract, batch_size))
    features = read_array(Path(path))
    if len(features) != len(train):
        raise InputError(
            f"--features {str(path)!r} has those of {len(features)} images, and --data {len(train)} to train on: they "
            "are of other data; name a new file."
        )
    return TrainIcons(columns, features, np.arange(len(train)))


def _write_features(path: Path, train: Dataset, processor, extract, batch_size: int) -> None:
    batches = image_batches(train, processor, batch_size, "features of training images")
    first = extract(next(batches)).cpu().numpy()
    with ArrayWriter(path, first.shape[1:], np.float32) as writer:
        writer.extend(first)
        for batch in batches:
            writer.extend(extract(batch).cpu().numpy())


def compute_features(
    train: Dataset,
    columns: dict[str, list],
    rows: Sequence[int],
    processor,
    extract: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
) -> TrainIcons:
    """
    Computes the features of some training images, some 2 ms each.

    Args:
        train: the icons.
        columns: see `TrainIcons`.
        rows: numbers of the images.
        processor: a `MomaProcessor`.
        extract: pixel values `[B, 3, H, W]` in [-1, 1] to features `[B, D]`.
        batch_size: images at once.
    """
    numbers = np.sort(np.asarray(rows, dtype=np.int64))
    batches = image_batches(train.select(numbers), processor, batch_size, "features of training images")
    return TrainIcons(columns, np.concatenate([extract(batch).cpu().numpy() for batch in batches]), numbers)


def rows_by_hash(columns: dict[str, list], limit: int, names: Sequence[str], each: int) -> list[int]:
    """
    Returns the numbers of training icons, chosen by hash.

    Args:
        columns: see `TrainIcons`.
        limit: of any name, at most.
        names: of which there are to be some, beside those.
        each: of each of the names, at most.
    """
    keys = [order(*pair) for pair in zip(columns["set"], columns["icon"])]
    numbers = sorted(range(len(keys)), key=keys.__getitem__)
    chosen, left = set(numbers[:limit]), dict.fromkeys(names, each)
    for number in numbers:
        name = normalised(columns["name"][number])
        if left.get(name):
            left[name] -= 1
            chosen.add(number)
    return sorted(chosen)


def nearest(train: TrainIcons, features: torch.Tensor, families: Sequence[str], kept: int = KEPT) -> list[list[dict]]:
    """
    Finds the training images of other families that are most similar to images, by the cosine of their features.

    Args:
        train: with features `[F, D]`.
        features: of the images, `[N, D]`.
        families: of each image, whose own training images are left out.
        kept: neighbours of each image at most.

    Returns:
        The rows of each image's neighbours, the nearest first.
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


def distinct_names(neighbours: Sequence[dict], count: int) -> list[str]:
    """Returns the first so many different names among an image's neighbours."""
    return list(dict.fromkeys(normalised(row["name"]) for row in neighbours))[:count]


def distinct_tags(neighbours: Sequence[dict], count: int) -> list[str]:
    """Returns the first so many different makers' tags of an image's neighbours."""
    return list(dict.fromkeys(normalised(tag) for row in neighbours for tag in row["keywords"]))[:count]
