# SPDX-License-Identifier: Apache-2.0
"""Thins the held-out splits to what a measure needs, and takes held-out words out of what trains."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from icons_recipe.near import LIMIT
from icons_recipe.rows import Row
from icons_recipe.words import HeldOutWords


IMAGES_PER_CELL = 2
CELLS_PER_FAMILY = 400
REPEATS, SAMPLED = (
    f"more than {IMAGES_PER_CELL} images, or near-identical ones, of a held-out cell",
    f"more than {CELLS_PER_FAMILY} cells of a family that never trains",
)


def thin_out(rows: Sequence[Row], of_row: Sequence[str | None]) -> tuple[list[str | None], Counter]:
    """
    Keeps two images that differ of each held-out cell, and 400 cells of each family that never trains.

    Args:
        rows: all rows.
        of_row: the split of each row, or `None`.

    Returns:
        The split of each row that is kept, and counts of what is left out, by reason.
    """
    kept, dropped, cells = list(of_row), Counter(), defaultdict(list)
    for number, split in enumerate(of_row):
        if split not in (None, "train"):
            cells[split, rows[number].cell].append(number)
    taken = Counter()
    for (split, cell), numbers in sorted(cells.items(), key=lambda item: _order(*item[0][1])):
        sampled_out = split == "test_family" and taken[cell[0]] == CELLS_PER_FAMILY
        taken[cell[0]] += split == "test_family" and not sampled_out
        chosen = [] if sampled_out else _choose(rows, numbers)
        for number in set(numbers) - set(chosen):
            kept[number] = None
            dropped[SAMPLED if sampled_out else REPEATS] += 1
    return kept, dropped


def without_held_out(row: Row, held_out: HeldOutWords) -> Row:
    """Returns the row without the aliases, keywords and categories in which held-out words stand."""
    lists = {field: tuple(held_out.without(getattr(row, field))) for field in ("aliases", "keywords", "categories")}
    return replace(row, **lists)


def _choose(rows, numbers):
    chosen, greys = [], []
    for number in sorted(numbers, key=lambda number: _order(rows[number].set, rows[number].icon)):
        grey = np.frombuffer(rows[number].grey, dtype=np.uint8).astype(int)
        if len(chosen) < IMAGES_PER_CELL and all(np.abs(grey - other).mean() >= LIMIT for other in greys):
            chosen.append(number)
            greys.append(grey)
    return chosen


def _order(*parts):
    """A random order that does not change with what else is in the set."""
    return hashlib.sha256(":".join(parts).encode()).digest()
