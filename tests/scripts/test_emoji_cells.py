# SPDX-License-Identifier: Apache-2.0
"""Drawing families, base labels, and the split by drawing."""

import pytest

from emoji_recipe.card import fill_card
from emoji_recipe.cells import STYLES, base_label, drawing_family, merge_cells, split_cells
from emoji_recipe.sources import Emoji, is_flag_of_place, label_slug, normalize_code_points


@pytest.mark.parametrize(
    ("label", "base"),
    [
        ("waving hand: dark skin tone", "waving hand"),
        ("waving hand", "waving hand"),
        ("man: medium-light skin tone, red hair", "man: red hair"),
        ("handshake: light skin tone, medium-dark skin tone", "handshake"),
        ("kiss: man, man, light skin tone, dark skin tone", "kiss: man, man"),
        ("kiss: person, person, light skin tone, dark skin tone", "kiss"),
        ("woman running: light skin tone, facing right", "woman running: facing right"),
        ("family: man, boy", "family: man, boy"),
        ("light skin tone", "light skin tone"),
    ],
)
def test_base_label_drops_only_the_skin_tone(label, base):
    assert base_label(label) == base


def test_fluent_styles_are_one_family_and_all_others_their_own():
    families = {style: drawing_family(style) for style in STYLES}
    assert families["fluent"] == families["fluent flat"] == families["fluent 3d"]
    assert len(set(families.values())) == len(STYLES) - 2
    assert families["noto"] != families["noto v1"]


def test_unknown_style_is_refused_by_name():
    with pytest.raises(ValueError, match="openmoji"):
        drawing_family("openmoji")


def test_cells_that_share_an_image_are_merged_through_a_chain():
    cells = [("a", "x"), ("b", "x"), ("b", "x"), ("c", "x"), ("d", "x"), ("a", "y")]
    images = [1, 1, 2, 2, 3, 4]
    assert sorted(map(sorted, merge_cells(cells, images))) == [[0, 1, 2, 3], [4], [5]]


def test_rows_and_images_of_different_number_are_refused():
    with pytest.raises(ValueError, match="images"):
        merge_cells([("a", "x")], [])


def make_rows():
    cells = [
        (f"label {i}", family) for i in range(200) for family in ("x", "y", "z") for _ in range(1 + (family == "z"))
    ]
    # every tenth label of one family has the image of the label before it
    images = [
        (family, i - (family == "x" and i % 10 == 9), copy if family == "z" else 0)
        for i in range(200)
        for family in ("x", "y", "z")
        for copy in range(1 + (family == "z"))
    ]
    return cells, images


def test_split_keeps_cells_images_and_labels_apart_and_hits_the_shares():
    cells, images = make_rows()
    splits = split_cells(cells, images, {"validation": 0.1, "test": 0.2}, seed=3)
    for keys in (cells, images):
        sides = {}
        for key, split in zip(keys, splits, strict=True):
            assert sides.setdefault(key, split) == split
    in_train = {label for (label, _), split in zip(cells, splits, strict=True) if split == "train"}
    assert in_train == {label for label, _ in cells}
    assert splits.count("validation") == pytest.approx(0.1 * len(cells), abs=4)
    assert splits.count("test") == pytest.approx(0.2 * len(cells), abs=4)


def test_split_depends_on_the_seed_alone():
    cells, images = make_rows()
    first, again, other = (split_cells(cells, images, {"test": 0.1}, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_labels_of_one_family_and_large_groups_stay_in_train():
    cells = [(f"label {i}", family) for i in range(6) for family in ("x", "y")] + [("alone", "x")]
    images = ["same" if family == "x" and label != "alone" else (label, family) for label, family in cells]
    splits = split_cells(cells, images, {"test": 0.9}, max_cells=4)
    held_out = {cell for cell, split in zip(cells, splits, strict=True) if split == "test"}
    assert held_out == {(f"label {i}", "y") for i in range(6)}


def test_shares_that_leave_no_train_are_refused():
    with pytest.raises(ValueError, match="shares"):
        split_cells([("a", "x")], [0], {"validation": 0.5, "test": 0.5})


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


def test_card_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="card"):
        fill_card("# no head", {}, {}, "")
