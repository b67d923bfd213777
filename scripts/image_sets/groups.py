# SPDX-License-Identifier: Apache-2.0
"""Which drawings belong together: near-identical ones among hundreds of thousands, and what is linked by them."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from image_sets.emoji import drawing_cell
from image_sets.icon_images import GREY_SIDE, decode, small_grey
from image_sets.icon_names import EMOJI_FAMILIES
from image_sets.icon_rows import Row
from modeling_moma.utils.atomic_files import atomic_write


# of these makers nothing trains
TEST_FAMILIES = ("carbon", "game-icons", "healthicons", "meteocons", "streamline-freehand")
# mean difference of 16x16 grey values, of 255
LIMIT = 6.0
BLANK, COPY, EMOJI_CELL, EMOJI_IMAGE = (
    "blank",
    "exact copy under the same style and name",
    "emoji that the emoji set holds out",
    "near-identical to an image that the emoji set holds out",
)
_LEAF, _CHUNK = 256, 1 << 18
# pairs of families with fewer names in common say nothing
_LEAST_SHARED = 50
# of the names in common; below it, arrows, crosses and other simple shapes link most sets to one another by chains
_ALIKE_SHARE = 0.3


def linked_groups(size: int, links: Iterable[tuple[int, int]]) -> np.ndarray:
    """The smallest number below `size` that each such number is linked to, directly or through others."""
    parent = list(range(size))

    def root(item):
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for first, second in links:
        first, second = root(first), root(second)
        # the smaller one is the root, so that the result does not depend on the order of the links
        parent[max(first, second)] = min(first, second)
    return np.array([root(item) for item in range(size)], dtype=np.int64)


def near_pairs(greys: np.ndarray) -> np.ndarray:
    """
    Finds all pairs of rows of uint8 `(rows, 256)` whose mean absolute difference is below `LIMIT`. None is missed.

    The mean difference of an image is never below that of the same image at a quarter of its side. So rows are put
    into boxes by their 4x4 values, boxes too far apart are never compared, and the few pairs that are close at 4x4 are
    compared at 8x8, then at 16x16. Each pair comes once, the smaller row first, in ascending order.
    """
    coarse, middle = (_block_means(greys, side) for side in (4, 8))
    leaves = _leaves(coarse)
    order = np.concatenate(leaves)
    bounds = np.cumsum([0, *map(len, leaves)])
    low = np.stack([coarse[leaf].min(axis=0) for leaf in leaves])
    high = np.stack([coarse[leaf].max(axis=0) for leaf in leaves])
    # sums of float32 values may be off in the last places
    coarse_limit = (LIMIT + 1e-3) * coarse.shape[1]
    found = [np.empty((0, 2), dtype=np.int64)]
    for number, leaf in enumerate(tqdm(leaves, desc="comparing")):
        gaps = np.maximum(low[number:] - high[number], low[number] - high[number:]).clip(0).sum(axis=1)
        near = number + np.flatnonzero(gaps < coarse_limit)
        others = np.concatenate([order[bounds[i] : bounds[i + 1]] for i in near])
        outside = np.maximum(coarse[others] - high[number], low[number] - coarse[others]).clip(0).sum(axis=1)
        others = others[outside < coarse_limit]
        distances = torch.cdist(torch.from_numpy(coarse[leaf]), torch.from_numpy(coarse[others]), p=1).numpy()
        first, second = np.nonzero(distances < coarse_limit)
        pairs = np.sort(np.stack([leaf[first], others[second]], axis=1), axis=1)
        found.append(_close(pairs[pairs[:, 0] < pairs[:, 1]], middle, greys))
    return np.unique(np.concatenate(found), axis=0)


def _block_means(greys, side):
    step = GREY_SIDE // side
    blocks = greys.reshape(-1, side, step, side, step)
    return blocks.mean(axis=(2, 4), dtype=np.float32).reshape(-1, side * side)


def _leaves(points):
    """Halves the rows along the widest of their dimensions until the parts are small."""
    open_parts, leaves = [np.arange(len(points))], []
    while open_parts:
        rows = open_parts.pop()
        if len(rows) <= _LEAF:
            leaves.append(rows)
            continue
        values = points[rows]
        widest = int(values.std(axis=0).argmax())
        ordered = rows[np.argsort(values[:, widest], kind="stable")]
        open_parts += [ordered[: len(rows) // 2], ordered[len(rows) // 2 :]]
    return leaves


def _close(pairs, middle, greys):
    """Those of the pairs that are below the limit, first by 8x8 means, then by all values."""
    kept = [pairs[:0]]
    for start in range(0, len(pairs), _CHUNK):
        part = pairs[start : start + _CHUNK]
        distances = np.abs(middle[part[:, 0]] - middle[part[:, 1]]).sum(axis=1)
        part = part[distances < (LIMIT + 1e-3) * middle.shape[1]]
        first, second = greys[part[:, 0]], greys[part[:, 1]]
        exact = (np.maximum(first, second) - np.minimum(first, second)).sum(axis=1, dtype=np.int64)
        kept.append(part[exact < LIMIT * greys.shape[1]])
    return np.concatenate(kept)


def merge_alike(families: Sequence[str], names: Sequence[str], pairs: np.ndarray) -> dict[str, str]:
    """
    Merges families that draw more than 30 % of the names they share near-identically.

    `pairs` are row numbers of near-identical drawings. The merged family is the first of its members in the alphabet.
    """
    holders = defaultdict(set)
    for family, name in zip(families, names, strict=True):
        holders[name].add(family)
    shared = Counter()
    for members in holders.values():
        ordered = sorted(members)
        shared.update((a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :])
    alike = {
        (*sorted((families[i], families[j])), names[i])
        for i, j in pairs.tolist()
        if families[i] != families[j] and names[i] == names[j]
    }
    common = Counter((a, b) for a, b, _ in alike)
    ordered = sorted(set(families))
    index = {family: number for number, family in enumerate(ordered)}
    links = [
        (index[a], index[b])
        for (a, b), count in common.items()
        if shared[a, b] >= _LEAST_SHARED and count > _ALIKE_SHARE * shared[a, b]
    ]
    groups = linked_groups(len(ordered), links)
    return {family: ordered[groups[number]] for family, number in index.items()}


@dataclass(frozen=True)
class HeldOutEmoji:
    """What the emoji set holds out: cells of (base label, family), and 16x16 greys of the images.

    `train_greys` are those of its train split, `train_texts` its labels and keywords.
    """

    cells: frozenset[tuple[str, str]]
    greys: np.ndarray
    train_greys: np.ndarray
    train_texts: tuple[str, ...]


def read_held_out(folder: Path) -> HeldOutEmoji:
    """Reads the committed emoji set, laid out as in `data/emoji`."""
    train, *others = (
        pq.read_table(sorted((folder / "data").glob(f"{split}-*.parquet"))).to_pylist()
        for split in ("train", "validation", "test")
    )
    held_out = [row for rows in others for row in rows]
    greys = [np.stack([small_grey(decode(row["image"]["bytes"])) for row in rows]) for rows in (held_out, train)]
    texts = tuple({text for row in train for text in (row["label"], *row["keywords"])})
    return HeldOutEmoji(frozenset(drawing_cell(row["label"], row["style"]) for row in held_out), *greys, texts)


@dataclass(frozen=True)
class Grouped:
    """Rows in the order of sets and names, the group of each, and near-identical pairs among them.

    `stays` tells which rows show what the emoji set trains on, so that they can only train. `dropped` counts what was
    left out, by reason.
    """

    rows: list[Row]
    groups: np.ndarray
    pairs: np.ndarray
    stays: np.ndarray
    dropped: Counter


def drop_and_group(rows: Sequence[Row], held_out_slugs: dict, emoji: HeldOutEmoji, cache: Path) -> Grouped:
    """
    Drops blank images, exact copies and what the emoji set holds out, and groups the rest.

    `held_out_slugs` are file names, by set, that the emoji set holds out; `cache` keeps pairs for a later run.
    """
    dropped = Counter()
    seen, kept = set(), []
    for row in rows:
        key = (row.hash, row.set, row.style, row.name)
        reason = BLANK if set(row.grey) == {255} else COPY if key in seen else None
        if reason is None and row.icon in held_out_slugs.get(row.set, ()):
            reason = EMOJI_CELL
        seen.add(key)
        if reason is None:
            kept.append(row)
        else:
            dropped[reason] += 1
    count = len(kept)
    # of drawings and of files: losses must hide no pair, and who reads the files alone must find none
    greys = [
        np.concatenate([_greys([getattr(row, field) for row in kept]), emoji.greys, emoji.train_greys])
        for field in ("grey", "stored_grey")
    ]
    pairs = np.unique(np.concatenate([_cached_pairs(part, cache) for part in greys]), axis=0)
    across = pairs[(pairs[:, 0] < count) & (pairs[:, 1] >= count)]
    of_held_out = across[:, 1] < count + len(emoji.greys)
    # the whole cell goes with an image that the emoji set holds out
    cells = {kept[row].cell for row in across[of_held_out, 0].tolist()}
    keep = np.array([row.cell not in cells for row in kept])
    dropped[EMOJI_IMAGE] = int((~keep).sum())
    stays = np.array([row.set in EMOJI_FAMILIES for row in kept])
    stays[across[~of_held_out, 0]] = True
    inner = pairs[pairs[:, 1] < count]
    inner = inner[keep[inner].all(axis=1)]
    position = np.cumsum(keep) - 1
    rest = [row for row, kept_row in zip(kept, keep.tolist(), strict=True) if kept_row]
    return _group(rest, position[inner], stays[keep], dropped)


def _group(rows, pairs, stays, dropped):
    merged = merge_alike([row.family for row in rows], [row.name for row in rows], pairs)
    # a family that never trains keeps its name, and so does one that draws like it: only drawings are kept apart then
    rows = [
        row
        if row.family in TEST_FAMILIES or merged[row.family] in TEST_FAMILIES
        else replace(row, family=merged[row.family])
        for row in rows
    ]
    first = {}
    links = [(first.setdefault(row.cell, number), number) for number, row in enumerate(rows)]
    groups = linked_groups(len(rows), [*links, *pairs.tolist()])
    return Grouped(rows, groups, pairs, stays, dropped)


def _greys(values):
    return np.frombuffer(b"".join(values), dtype=np.uint8).reshape(len(values), -1)


def _cached_pairs(greys, cache):
    path = cache / f"pairs-{hashlib.sha256(greys.tobytes()).hexdigest()[:16]}.npy"
    if not path.exists():
        pairs = near_pairs(greys)

        def write(aside):
            with aside.open("wb") as file:
                np.save(file, pairs)

        atomic_write(path, write)
    return np.load(path)
