# SPDX-License-Identifier: Apache-2.0
"""Labels of emoji, and their split by drawing."""

import pytest

from cards import replace_block
from image_sets.emoji import Emoji, base_label, is_flag_of_place, label_slug, normalize_code_points
from image_sets.splits import merge_cells, split_emoji


@pytest.mark.parametrize(
    ("label", "base"),
    [
        ("waving hand: dark skin tone", "waving hand"),
        ("man: medium-light skin tone, red hair", "man: red hair"),
        ("kiss: person, person, light skin tone, dark skin tone", "kiss"),
        ("family: man, boy", "family: man, boy"),
        ("light skin tone", "light skin tone"),
    ],
)
def test_base_label_drops_only_the_skin_tone(label, base):
    assert base_label(label) == base


def test_cells_that_share_an_image_are_merged_through_a_chain():
    cells = [("a", "x"), ("b", "x"), ("b", "x"), ("c", "x"), ("d", "x"), ("a", "y")]
    images = [1, 1, 2, 2, 3, 4]
    assert sorted(map(sorted, merge_cells(cells, images))) == [[0, 1, 2, 3], [4], [5]]


def make_rows():
    places = [(i, family, copy) for i in range(200) for family, copy in (("x", 0), ("y", 0), ("z", 0), ("z", 1))]
    # every tenth label of one family has the image of the label before it
    images = [(family, i - (family == "x" and i % 10 == 9), copy) for i, family, copy in places]
    return [(f"label {i}", family) for i, family, _ in places], images


def test_split_keeps_cells_images_and_labels_apart_and_hits_the_shares():
    cells, images = make_rows()
    splits, again, other = (split_emoji(cells, images, {"validation": 0.1, "test": 0.2}, seed) for seed in (3, 3, 4))
    assert splits == again != other
    for keys in (cells, images):
        sides = {}
        for key, split in zip(keys, splits, strict=True):
            assert sides.setdefault(key, split) == split
    in_train = {label for (label, _), split in zip(cells, splits, strict=True) if split == "train"}
    assert in_train == {label for label, _ in cells}
    assert splits.count("validation") == pytest.approx(0.1 * len(cells), abs=4)
    assert splits.count("test") == pytest.approx(0.2 * len(cells), abs=4)


def test_labels_of_one_family_and_large_groups_stay_in_train():
    cells = [(f"label {i}", family) for i in range(6) for family in ("x", "y")] + [("alone", "x")]
    images = ["same" if family == "x" and label != "alone" else (label, family) for label, family in cells]
    splits = split_emoji(cells, images, {"test": 0.9})
    held_out = {cell for cell, split in zip(cells, splits, strict=True) if split == "test"}
    assert held_out == {(f"label {i}", "y") for i in range(6)}


def test_file_names_are_matched_by_code_points_and_slugs():
    assert normalize_code_points("2764-fe0f-200d-1f525") == "2764-200D-1F525"
    assert label_slug("Man’s shoe: No. 1") == "mans-shoe-no-1"
    assert label_slug("flag: Côte d’Ivoire") == "flag-cote-divoire"


def test_only_flags_of_places_count_as_such():
    def emoji(code_points):
        return Emoji(code_points, "", (), "flags", "", False)

    assert is_flag_of_place(emoji("1F1F3-1F1F4"))
    assert is_flag_of_place(emoji("1F3F4-E0067-E0062-E0065-E006E-E0067-E007F"))
    assert not is_flag_of_place(emoji("1F3C1"))
    assert not is_flag_of_place(emoji("1F3F4-200D-2620"))


def test_blocks_of_a_card_are_replaced_and_a_missing_one_is_named():
    card = "<!-- counts: start -->\nold\n<!-- counts: end -->"
    assert replace_block(card, "new") == card.replace("old", "new")
    with pytest.raises(ValueError, match="<!-- sizes: start --> and"):
        replace_block(card, "new", "sizes")
