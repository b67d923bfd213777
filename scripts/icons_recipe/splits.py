# SPDX-License-Identifier: Apache-2.0
"""Splits rows so that no drawing stands on two sides, and holds out cells, families, words and pairs of words."""

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from icons_recipe.drawing import COLOURS
from icons_recipe.names import words
from icons_recipe.words import rows_by_word, stems


SPLITS = ("train", "validation", "test", "test_family", "test_words", "test_pairs")
TEST_FAMILIES = ("carbon", "game-icons", "healthicons", "meteocons", "streamline-freehand")


@dataclass(frozen=True)
class SplitSizes:
    """How many cells, words and pairs are held out, and how large what is held out may be."""

    validation: int = 1000
    test: int = 2000
    words: int = 300
    pairs: int = 300
    # of merged cells that are held out together, so that no crowd of look-alikes makes up a split
    most_cells: int = 4
    # of a word, or of a pair, in all families
    most_word_cells: int = 16
    # that draw a held-out word or pair
    least_families: int = 2
    # images in whose names each word of a pair stands
    least_seen: int = 20


@dataclass(frozen=True)
class Splits:
    """The split of each row, or `None` where it is in none, and the words and pairs that are held out."""

    of_row: list[str | None]
    words: tuple[str, ...]
    pairs: tuple[str, ...]


class _Splitter:
    def __init__(self, families, names, groups, stays, seen_texts, sizes, seed):
        self.families, self.names, self.sizes = families, names, sizes
        self.cells = list(zip(families, names, strict=True))
        self.groups = groups
        self.members = defaultdict(list)
        for row, group in enumerate(groups.tolist()):
            self.members[group].append(row)
        self.random = random.Random(seed)
        self.of_row = ["train"] * len(names)
        self.seen = [stems(text) for text in seen_texts]
        # groups whose rows have a place already, or must stay where they are
        self.closed = {group for group, stay in zip(groups.tolist(), stays, strict=True) if stay}
        self.free = np.ones(len(names), dtype=bool)

    def hold_out_families(self, held_out):
        """Rows of these families never train; those that look like others' drawings are in no split."""
        inside = np.array([family in held_out for family in self.families])
        for row in np.flatnonzero(inside).tolist():
            self.of_row[row] = None
        self.free[inside] = False
        for group in np.unique(self.groups[inside]).tolist():
            if group not in self.closed and all(inside[row] for row in self.members[group]):
                for row in self.members[group]:
                    self.of_row[row] = "test_family"
            self.closed.add(group)

    def hold_out_phrases(self, split, candidates, wanted):
        """Holds out every row in whose name all words of a phrase stand, for `wanted` of the candidates."""
        index = rows_by_word(self.names)
        seen_with = defaultdict(list)
        for text in self.seen:
            for word in text:
                seen_with[word].append(text)
        drawn_by = defaultdict(set)
        for family, name in np.array(self.cells)[self.free].tolist():
            drawn_by[name].add(family)
        self.random.shuffle(candidates)
        # what many makers draw is a thing, and no maker's own word
        candidates.sort(key=lambda phrase: -min(len(drawn_by[phrase]), 3))
        taken = []
        for phrase in candidates:
            if len(taken) == wanted:
                break
            parts = stems(phrase)
            rows = set.intersection(*(index[word] for word in parts))
            rows = {row for row in rows if self.free[row]}
            groups = {int(self.groups[row]) for row in rows}
            if (
                len({self.cells[row] for row in rows}) > self.sizes.most_word_cells
                or len(drawn_by[phrase]) < self.sizes.least_families
                or groups & self.closed
                or any(row not in rows for group in groups for row in self.members[group])
                or any(parts <= text for text in seen_with[min(parts)])
                or not self._still_seen(parts, rows, index)
            ):
                continue
            for row in rows:
                self.of_row[row] = split
            self.free[list(rows)] = False
            self.closed |= groups
            taken.append(phrase)
        return tuple(sorted(taken))

    def _still_seen(self, parts, rows, index):
        """Each word of a pair must stand in enough names that train, those of earlier words and pairs apart."""
        if len(parts) == 1:
            return True
        trained = ({row for row in index[word] - rows if self.free[row]} for word in parts)
        return all(len(found) >= self.sizes.least_seen for found in trained)

    def hold_out_cells(self, wanted):
        """Holds out groups of cells, each of whose names keeps another family's drawing in train."""
        left = defaultdict(set)
        for row in np.flatnonzero(self.free).tolist():
            left[self.names[row]].add(self.families[row])
        groups = sorted({int(group) for group in self.groups[self.free]} - self.closed)
        self.random.shuffle(groups)
        held_out = Counter()
        for group in groups:
            split = min(wanted, key=lambda name: held_out[name] / wanted[name])
            if held_out[split] >= wanted[split]:
                break
            cells = {self.cells[row] for row in self.members[group]}
            taken = defaultdict(set)
            for family, name in cells:
                taken[name].add(family)
            too_many = len(cells) > min(self.sizes.most_cells, wanted[split] - held_out[split])
            if too_many or any(not left[name] - families for name, families in taken.items()):
                continue
            for name, families in taken.items():
                left[name] -= families
            for row in self.members[group]:
                self.of_row[row] = split
            held_out[split] += len(cells)


def split_rows(
    families: Sequence[str],
    names: Sequence[str],
    groups: np.ndarray,
    stays: Sequence[bool],
    seen_texts: Sequence[str] = (),
    brands: Collection[str] = (),
    held_out_families: Sequence[str] = TEST_FAMILIES,
    sizes: SplitSizes | None = None,
    seed: int = 0,
) -> Splits:
    """
    Splits rows by whole groups.

    Args:
        families: the family of each row.
        names: the name of each row.
        groups: the group of each row: rows of one cell, and rows of cells that hold near-identical drawings.
        stays: whether a row must stay in train, with its group.
        seen_texts: texts that a model may have been trained on elsewhere; no word or pair of theirs is held out.
        brands: words that are no words but names of companies or products; none of them is held out.
        held_out_families: families of `test_family`.
        sizes: how much is held out.
        seed: all choices are drawn at random with this seed.

    Returns:
        The split of each row and the phrases that are held out.
    """
    sizes = sizes or SplitSizes()
    splitter = _Splitter(families, names, groups, stays, seen_texts, sizes, seed)
    splitter.hold_out_families(frozenset(held_out_families))
    distinct = sorted(set(names))
    distinct = [name for name in distinct if not any(word in brands for word in words(name))]
    single = [name for name in distinct if name.isalpha() and name.isascii() and len(name) > 2]
    double = [name for name in distinct if _is_pair(name)]
    held_words = splitter.hold_out_phrases("test_words", single, sizes.words)
    held_pairs = splitter.hold_out_phrases("test_pairs", double, sizes.pairs)
    splitter.hold_out_cells({"validation": sizes.validation, "test": sizes.test})
    return Splits(splitter.of_row, held_words, held_pairs)


def _is_pair(name):
    parts = name.split()
    # a colour stands before the names of painted icons
    if len(parts) != 2 or len(stems(name)) != 2 or not COLOURS.keys().isdisjoint(parts):
        return False
    return all(part.isalpha() and len(part) > 1 for part in parts)
