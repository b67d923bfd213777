# SPDX-License-Identifier: Apache-2.0
"""The embedded data set: it loads offline, and no drawing of a held-out split stands in `train`."""

import hashlib
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset

from image_sets.cards import emoji_table
from image_sets.emoji import FAMILIES, drawing_cell
from image_sets.packages import EMOJI_PACKAGES
from image_sets.splits import EMOJI_SPLITS as SPLITS


FOLDER = Path(__file__).resolve().parents[2] / "data" / "emoji"


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    yield load_dataset(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("datasets")))
    patch.undo()


@pytest.fixture(scope="module")
def text(emoji):
    return {split: emoji[split].remove_columns("image").to_list() for split in SPLITS}


@pytest.fixture(scope="module")
def pixels(emoji):
    return {
        split: [(image.size, image.mode, hashlib.sha256(image.tobytes()).digest()) for image in emoji[split]["image"]]
        for split in SPLITS
    }


def cells_of(rows):
    return {drawing_cell(row["label"], row["style"]) for row in rows}


def test_splits_have_the_columns_of_the_contract(emoji):
    assert set(emoji) == set(SPLITS)
    for split in SPLITS:
        assert emoji[split].column_names == ["image", "style", "label", "keywords", "group", "subgroup"]


def test_only_permissively_licensed_styles_and_each_in_every_split(text):
    for split in SPLITS:
        assert {row["style"] for row in text[split]} == set(FAMILIES)


def test_no_drawing_is_on_two_sides(text):
    train, validation, test = (cells_of(text[split]) for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_no_stored_image_is_on_two_sides(pixels):
    train, validation, test = (set(pixels[split]) for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_every_held_out_label_has_another_family_in_train(text):
    families = defaultdict(set)
    for label, family in cells_of(text["train"]):
        families[label].add(family)
    for split in ("validation", "test"):
        for label, family in cells_of(text[split]):
            assert families[label] - {family}, f"{label} of {family} in {split}"


def test_no_image_of_a_style_stands_twice_under_one_label(text, pixels):
    keys = [
        (row["style"], row["label"], image)
        for split in SPLITS
        for row, image in zip(text[split], pixels[split], strict=True)
    ]
    assert len(keys) == len(set(keys))


def test_card_counts_are_those_of_the_files(text):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert emoji_table(text) in card
    info = yaml.safe_load(card.split("---\n")[1])["dataset_info"]
    assert {split["name"]: split["num_examples"] for split in info["splits"]} == {s: len(text[s]) for s in SPLITS}
    assert info["download_size"] == sum(path.stat().st_size for path in (FOLDER / "data").iterdir())


def test_licences_name_every_style_and_package_version():
    licences = (FOLDER / "LICENSES" / "README.md").read_text(encoding="utf-8")
    for style in FAMILIES:
        assert f"`{style}`" in licences
    # this one gives the names of files only
    for name in set(EMOJI_PACKAGES) - {"@iconify-json/fluent-emoji-flat"}:
        assert f"{name} {EMOJI_PACKAGES[name]}" in licences
