# SPDX-License-Identifier: Apache-2.0
"""Drops what may not stand in the set, and groups the rest by cells and near-identical drawings."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from icons_recipe.emoji import EMOJI_FAMILIES, HeldOutEmoji
from icons_recipe.families import merge_alike
from icons_recipe.near import near_pairs
from icons_recipe.rows import Row
from icons_recipe.splits import TEST_FAMILIES
from image_sets.components import linked_groups
from modeling_moma.utils.atomic_files import atomic_write


BLANK, COPY, EMOJI_CELL, EMOJI_IMAGE = (
    "blank",
    "exact copy under the same style and name",
    "emoji that the emoji set holds out",
    "near-identical to an image that the emoji set holds out",
)


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


def drop_and_group(
    rows: Sequence[Row],
    held_out_slugs: dict[str, set[str]],
    emoji: HeldOutEmoji,
    cache: Path,
    on_done: Callable[[int], None] = lambda count: None,
) -> Grouped:
    """
    Drops blank images, exact copies and what the emoji set holds out, and groups the rest.

    Args:
        rows: all rows.
        held_out_slugs: file names, by set, that the emoji set holds out.
        emoji: images of the emoji set.
        cache: keeps the near-identical pairs for a later run.
        on_done: called with the number of images compared, again and again.
    """
    dropped = Counter()
    seen, kept = set(), []
    for row in rows:
        key = (row.hash, row.set, row.style, row.name)
        reason = BLANK if set(row.grey) == {255} else COPY if key in seen else None
        if reason is None and row.icon in held_out_slugs.get(row.set, ()):
            reason = EMOJI_CELL
        seen.add(key)
        dropped[reason] += 1
        if reason is None:
            kept.append(row)
    count = len(kept)
    # of drawings and of files: losses must hide no pair, and who reads the files alone must find none
    greys = [
        np.concatenate([_greys([getattr(row, field) for row in kept]), emoji.greys, emoji.train_greys])
        for field in ("grey", "stored_grey")
    ]
    pairs = np.unique(np.concatenate([_cached_pairs(part, cache, on_done) for part in greys]), axis=0)
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
    del dropped[None]
    return _group(rest, position[inner], stays[keep], dropped)


def _group(rows, pairs, stays, dropped):
    families, names = [row.family for row in rows], [row.name for row in rows]
    merged = merge_alike(families, names, pairs)
    rows = [row if row.family in TEST_FAMILIES else replace(row, family=_trained(merged, row.family)) for row in rows]
    first, links = {}, []
    for number, row in enumerate(rows):
        links.append((first.setdefault(row.cell, number), number))
    groups = linked_groups(len(rows), [*links, *pairs.tolist()])
    return Grouped(rows, groups, pairs, stays, dropped)


def _trained(merged, family):
    """A family that draws like one that never trains keeps its own name: only drawings are kept apart then."""
    return family if merged[family] in TEST_FAMILIES else merged[family]


def _greys(values):
    return np.frombuffer(b"".join(values), dtype=np.uint8).reshape(len(values), -1)


def _cached_pairs(greys, cache, on_done):
    path = cache / f"pairs-{hashlib.sha256(greys.tobytes()).hexdigest()[:16]}.npy"
    if not path.exists():
        pairs = near_pairs(greys, on_done=on_done)

        def write(aside):
            with aside.open("wb") as file:
                np.save(file, pairs)

        atomic_write(path, write)
    else:
        on_done(len(greys))
    return np.load(path)
