# SPDX-License-Identifier: Apache-2.0
"""The split of icons by groups, held-out families, words and pairs, and what is kept of held-out cells."""

import hashlib
from collections import defaultdict

import numpy as np
import pytest

from image_sets.icon_names import HeldOutWords, stems
from image_sets.icon_rows import Row
from image_sets.splits import CELLS_PER_FAMILY, IMAGES_PER_CELL, SplitSizes, split_icons, thin_out, without_held_out


FAMILIES = ("x", "y", "z", "held")
FIRST = [chr(97 + i) * 3 for i in range(26)]
SIZES = SplitSizes(validation=20, test=40, words=10, pairs=10, most_word_cells=30, least_seen=3)


def make_rows():
    """Returns families, names and groups: two images a cell, and some cells of two families merged."""
    names = [*FIRST, *(f"{a} {b}" for i, a in enumerate(FIRST) for b in FIRST[i + 1 : i + 9 : 2])]
    cells = [(family, name) for name in names for family in FAMILIES for _ in range(2)]
    group_of = {}
    for number, (family, name) in enumerate(cells):
        partner = ("y", name) if family == "held" and name.startswith("a") else (family, name)
        group_of.setdefault(partner, number)
        group_of.setdefault((family, name), group_of[partner])
    return cells, np.array([group_of[cell] for cell in cells])


def split_all(seed=0, stays=None, seen=(), brands=()):
    cells, groups = make_rows()
    families, names = zip(*cells, strict=True)
    stays = [False] * len(cells) if stays is None else stays
    return cells, groups, split_icons(families, names, groups, stays, seen, brands, ("held",), SIZES, seed)


def test_no_group_stands_on_two_sides_and_sizes_are_met():
    cells, groups, splits = split_all()
    sides = defaultdict(set)
    for group, split in zip(groups.tolist(), splits.of_row, strict=True):
        sides[group].add(split)
    assert all(len(found - {None}) == 1 for found in sides.values())
    held = defaultdict(set)
    for cell, split in zip(cells, splits.of_row, strict=True):
        held[split].add(cell)
    assert len(held["validation"]) == 20 and len(held["test"]) == 40
    trained = defaultdict(set)
    for family, name in held["train"]:
        trained[name].add(family)
    assert all(trained[name] - {family} for family, name in held["validation"] | held["test"])


def test_families_that_are_held_out_never_train_and_leave_out_what_others_draw_alike():
    cells, _, splits = split_all()
    places = {split for (family, _), split in zip(cells, splits.of_row, strict=True) if family == "held"}
    assert places == {"test_family", None}
    left_out = {name for (_, name), split in zip(cells, splits.of_row, strict=True) if split is None}
    assert left_out == {name for _, name in cells if name.startswith("a")}


def test_words_and_pairs_stand_in_no_name_that_trains_and_words_of_pairs_do():
    cells, _, splits = split_all()
    assert len(splits.pairs) == 10 and 0 < len(splits.words) <= 10
    trained = [name for (_, name), split in zip(cells, splits.of_row, strict=True) if split == "train"]
    held_out = HeldOutWords([*splits.words, *splits.pairs])
    assert not [name for name in trained if held_out.found_in(name)]
    for pair in splits.pairs:
        for word in stems(pair):
            assert sum(word in stems(name) for name in trained) >= 1


def test_what_must_stay_and_what_was_read_elsewhere_is_not_held_out():
    cells, _ = make_rows()
    stays = [family == "x" for family, _ in cells]
    _, _, splits = split_all(stays=stays)
    assert {split for stay, split in zip(stays, splits.of_row, strict=True) if stay} == {"train"}
    assert not splits.words and not splits.pairs
    _, _, splits = split_all(seen=FIRST)
    assert not splits.words and splits.pairs
    _, _, splits = split_all(brands=FIRST[:20])
    assert splits.words and not set(" ".join([*splits.words, *splits.pairs]).split()) & set(FIRST[:20])


def test_split_depends_on_the_seed_alone():
    of_row = split_all()[2].of_row
    # an order of sets would differ from one process to the next
    assert hashlib.sha256(repr([str(split) for split in of_row]).encode()).hexdigest()[:16] == "5672747cc19d117e"
    assert split_all()[2].of_row != split_all(seed=1)[2].of_row


def make_row(icon, name="house", family="x", grey=0, **changed):
    fields = {"aliases": (), "keywords": (), "categories": (), "colour": None, "license": "MIT", "style": ""}
    image = {"image": b"", "grey": bytes([grey] * 256), "stored_grey": b"", "hash": ""}
    return Row(set=family, icon=icon, family=family, name=name, **(fields | image | changed))


def test_two_different_images_of_a_held_out_cell_are_kept_and_all_that_trains():
    rows = [make_row(f"icon {number}", grey=grey) for number, grey in enumerate((0, 3, 100, 103, 200, 203))]
    kept, dropped = thin_out(rows, ["test"] * 6)
    greys = [row.grey[0] // 100 for row, split in zip(rows, kept, strict=True) if split]
    assert len(greys) == IMAGES_PER_CELL == len(set(greys))
    assert sum(dropped.values()) == 4
    assert thin_out(rows, ["train"] * 6) == (["train"] * 6, {})


def test_cells_of_a_family_that_never_trains_are_sampled():
    rows = [make_row("a", name=f"name {number}", family=family) for number in range(500) for family in ("x", "y")]
    kept, _ = thin_out(rows, ["test_family"] * 1000)
    for family in ("x", "y"):
        assert sum(row.family == family and split is not None for row, split in zip(rows, kept)) == CELLS_PER_FAMILY


def test_held_out_words_leave_the_lists_of_a_row():
    row = make_row("a", aliases=("anvil", "home"), keywords=("roof", "cloud is off"), categories=("anvils",))
    cleaned = without_held_out(row, HeldOutWords(["anvil", "cloud off"]))
    assert (cleaned.aliases, cleaned.keywords, cleaned.categories) == (("home",), ("roof",), ())


@pytest.mark.parametrize(("colour", "label"), [("red", "red house"), ("black", "house"), (None, "house")])
def test_label_states_the_colour_of_painted_icons(colour, label):
    assert make_row("a", colour=colour).label == label
    assert make_row("a", family="fa7-solid", style="outline").full_style == "fa7 solid, outline"
