# SPDX-License-Identifier: Apache-2.0
"""Splits rows so that no drawing stands on two sides, and holds out cells, families, words and pairs of words."""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from image_sets.groups import LIMIT, TEST_FAMILIES, linked_groups
from image_sets.icon_images import COLOURS
from image_sets.icon_names import HeldOutWords, stems, words
from image_sets.icon_rows import Row


EMOJI_SPLITS = ("train", "validation", "test")
EMOJI_SHARES = {"validation": 0.035, "test": 0.05}
# of merged cells that are held out together, so that no crowd of look-alikes makes up a split
MOST_CELLS = 4
IMAGES_PER_CELL, CELLS_PER_FAMILY = 2, 400
REPEATS, SAMPLED = (
    f"more than {IMAGES_PER_CELL} images, or near-identical ones, of a held-out cell",
    f"more than {CELLS_PER_FAMILY} cells of a family that never trains",
)


def hold_out_cells(
    of_row: list,
    cells: Sequence[tuple[str, str]],
    groups: Sequence[Sequence[int]],
    families: dict[str, set[str]],
    wanted: dict[str, float],
    in_images: bool = False,
) -> None:
    """
    Moves groups of rows into the held-out splits, in their order, until these are full.

    `cells` are (name, family), `families` those that train of each name, of which one at least stays: a model can know
    the word, but not this drawing of it. `wanted` counts cells, which are met exactly, or images.
    """
    held_out = Counter()
    for rows in groups:
        # the split that lacks most of its share comes first, so all of them draw from the same distribution
        split = min(wanted, key=lambda name: held_out[name] / wanted[name])
        if held_out[split] >= wanted[split]:
            break
        own = {cells[row] for row in rows}
        size = len(rows) if in_images else len(own)
        taken = defaultdict(set)
        for name, family in own:
            taken[name].add(family)
        if (
            len(own) > MOST_CELLS
            or (not in_images and held_out[split] + size > wanted[split])
            or any(not families[name] - gone for name, gone in taken.items())
        ):
            continue
        for name, gone in taken.items():
            families[name] -= gone
        for row in rows:
            of_row[row] = split
        held_out[split] += size


def merge_cells(cells: Sequence[tuple[str, str]], images: Sequence[Hashable]) -> list[list[int]]:
    """
    Groups rows of one cell, and rows of cells with the same image: the flag of Norway is also that of Bouvet Island.

    Each group's row numbers ascend, and so do the groups by their first row.
    """
    first, links = {}, []
    for row, keys in enumerate(zip(cells, images, strict=True)):
        links += [(first.setdefault(key, row), row) for key in enumerate(keys)]
    members = defaultdict(list)
    for row, group in enumerate(linked_groups(len(cells), links).tolist()):
        members[group].append(row)
    return list(members.values())


def split_emoji(
    cells: Sequence[tuple[str, str]], images: Sequence[Hashable], shares: dict[str, float], seed: int = 0
) -> list[str]:
    """The split of each row by its (base label, family) cell and what its image is known by."""
    families = defaultdict(set)
    for label, family in cells:
        families[label].add(family)
    of_row, groups = ["train"] * len(cells), merge_cells(cells, images)
    random.Random(seed).shuffle(groups)
    wanted = {split: share * len(cells) for split, share in shares.items()}
    hold_out_cells(of_row, cells, groups, families, wanted, in_images=True)
    return of_row


@dataclass(frozen=True)
class SplitSizes:
    """How many cells, words and pairs of icons are held out, and how large what is held out may be."""

    validation: int = 1000
    test: int = 2000
    words: int = 300
    pairs: int = 300
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
        self.names, self.sizes, self.groups = names, sizes, groups
        self.cells = list(zip(names, families, strict=True))
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
        inside = np.array([family in held_out for _, family in self.cells])
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
        index = defaultdict(set)
        for row, name in enumerate(self.names):
            for word in stems(name):
                index[word].add(row)
        seen_with = defaultdict(list)
        for text in self.seen:
            for word in text:
                seen_with[word].append(text)
        drawn_by = self.families()
        self.random.shuffle(candidates)
        # what many makers draw is a thing, and no maker's own word
        candidates.sort(key=lambda phrase: -min(len(drawn_by[phrase]), 3))
        taken = []
        for phrase in candidates:
            if len(taken) == wanted:
                break
            parts = stems(phrase)
            rows = {row for row in set.intersection(*(index[word] for word in parts)) if self.free[row]}
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

    def families(self):
        """Families of the free rows, by name."""
        found = defaultdict(set)
        for row in np.flatnonzero(self.free).tolist():
            name, family = self.cells[row]
            found[name].add(family)
        return found

    def hold_out_cells(self, wanted):
        groups = sorted({int(group) for group in self.groups[self.free]} - self.closed)
        self.random.shuffle(groups)
        hold_out_cells(self.of_row, self.cells, [self.members[group] for group in groups], self.families(), wanted)


def split_icons(
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
    """
    sizes = sizes or SplitSizes()
    splitter = _Splitter(families, names, groups, stays, seen_texts, sizes, seed)
    splitter.hold_out_families(frozenset(held_out_families))
    distinct = [name for name in sorted(set(names)) if not any(word in brands for word in words(name))]
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


def thin_out(rows: Sequence[Row], of_row: Sequence[str | None]) -> tuple[list[str | None], Counter]:
    """Keeps two images that differ of each held-out cell, and 400 cells of each family that never trains."""
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


def without_held_out(row: Row, held_out: HeldOutWords) -> Row:
    """The row without the aliases, keywords and categories in which held-out words stand."""
    return replace(
        row,
        **{
            field: tuple(text for text in getattr(row, field) if not held_out.found_in(text))
            for field in ("aliases", "keywords", "categories")
        },
    )
