# SPDX-License-Identifier: Apache-2.0
"""The committed part of the icon set: it loads offline, and nothing that is held out stands in `train`."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from image_sets.groups import TEST_FAMILIES, near_pairs, read_held_out
from image_sets.icon_images import COLOURS, decode, image_hash, small_grey
from image_sets.icon_names import EMOJI_FAMILIES, HeldOutWords, emoji_name, stems
from image_sets.icon_rows import FEATURES, SAMPLE_ROWS, SPLITS, short_hash, write_splits
from image_sets.icon_sets import LICENSES
from image_sets.packages import ICON_PACKAGES
from image_sets.splits import CELLS_PER_FAMILY, SplitSizes


FOLDER = Path(__file__).resolve().parents[2] / "data" / "icons"
HELD_OUT = tuple(split for split in SPLITS if split != "train")


@pytest.fixture(scope="module")
def icons(tmp_path_factory):
    """The committed files alone, whatever else is built beside them."""
    folder = tmp_path_factory.mktemp("icons")
    (folder / "data").mkdir()
    for path in [FOLDER / "README.md", *committed_files()]:
        (folder / path.relative_to(FOLDER)).write_bytes(path.read_bytes())
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    yield load_dataset(str(folder), cache_dir=str(tmp_path_factory.mktemp("datasets")))
    patch.undo()


@pytest.fixture(scope="module")
def rows():
    """Each split's rows as stored, with `pixels`; of `train` those of its committed sample."""
    found = {}
    for path in committed_files():
        split = path.name.partition("-")[0]
        found[split] = pq.read_table(path).to_pylist()
        for row in found[split]:
            row["pixels"] = decode(row["image"]["bytes"])
    return found


@pytest.fixture(scope="module")
def greys(rows):
    """By split, what images are compared by."""
    return {split: np.stack([small_grey(row["pixels"], row["colour"]) for row in rows[split]]) for split in SPLITS}


@pytest.fixture(scope="module")
def listed():
    table = pq.read_table(FOLDER / "hashes.parquet").to_pylist()
    return {split: [row for row in table if row["split"] == split] for split in SPLITS}


@pytest.fixture(scope="module")
def phrases():
    return json.loads((FOLDER / "held_out.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def held_out_emoji():
    return read_held_out(FOLDER.parent / "emoji")


def committed_files():
    return [path for path in sorted((FOLDER / "data").glob("*.parquet")) if not path.name.startswith("train-0")]


def cells_of(rows):
    return {(row["family"], row["name"]) for row in rows}


def sides_of(listed, key):
    sides = defaultdict(set)
    for split in SPLITS:
        for row in listed[split]:
            sides[key(row)].add(split)
    return sides


def test_splits_have_the_columns_of_the_contract_and_a_train_split_where_none_is_built(icons):
    assert set(icons) == set(SPLITS)
    for split in SPLITS:
        assert icons[split].column_names == list(FEATURES)
    assert len(icons["train"]) == SAMPLE_ROWS
    assert icons["test"][0]["image"].size == (64, 64)


def test_a_split_of_few_sets_may_have_no_rows(tmp_path):
    write_splits(tmp_path, {split: [] for split in SPLITS}, seed=0)
    for split in SPLITS:
        assert pq.read_table(tmp_path / f"{split}-00000-of-00001.parquet").column_names == list(FEATURES)


def test_a_build_removes_older_files_of_its_own_alone(tmp_path):
    old, others = (
        ["train-00001-of-00002.parquet", "test-00000-of-00009.parquet"],
        ["customers.parquet", "train-x.parquet"],
    )
    for name in (*old, *others):
        (tmp_path / name).touch()
    write_splits(tmp_path, {split: [] for split in SPLITS}, seed=0)
    assert [(tmp_path / name).exists() for name in (*old, *others)] == [False, False, True, True]


def test_the_list_holds_every_committed_image_in_its_split(rows, listed):
    for split in SPLITS:
        hashes = {(row["set"], row["icon"]): row["hash"] for row in listed[split]}
        assert len(rows[split]) == (SAMPLE_ROWS if split == "train" else len(hashes))
        for row in rows[split]:
            assert hashes[row["set"], row["icon"]] == short_hash(image_hash(row["pixels"])), row["icon"]


def test_built_train_files_are_those_of_the_list_and_hold_no_held_out_text(listed, phrases):
    built = sorted((FOLDER / "data").glob("train-0*.parquet"))
    if not built:
        pytest.skip("train is not built here")
    texts = ["label", "style", "aliases", "keywords", "categories"]
    table = pq.read_table([*built, FOLDER / "data" / "train-sample.parquet"], columns=["set", "icon", *texts])
    found = table.to_pylist()
    assert {(row["set"], row["icon"]) for row in found} == {(row["set"], row["icon"]) for row in listed["train"]}
    held_out = HeldOutWords([*phrases["words"], *phrases["pairs"]])
    said = {text for row in found for text in (row["label"], row["style"], *row["aliases"], *row["keywords"])}
    said |= {text for row in found for text in row["categories"]}
    assert not [text for text in said if held_out.found_in(text)]


def test_no_group_cell_or_image_is_on_two_sides(listed):
    for key in (lambda row: row["group"], lambda row: (row["family"], row["name"]), lambda row: row["hash"]):
        assert all(len(found) == 1 for found in sides_of(listed, key).values())


def test_no_two_committed_splits_hold_near_identical_images(greys):
    splits = [split for split in SPLITS for _ in greys[split]]
    pairs = near_pairs(np.concatenate([greys[split] for split in SPLITS]))
    assert not [(splits[i], splits[j]) for i, j in pairs.tolist() if splits[i] != splits[j]]


def is_near_any(greys, others):
    """Whether a row of one set is near-identical to a row of the other."""
    pairs = near_pairs(np.concatenate([greys, others]))
    return bool(((pairs[:, 0] < len(greys)) & (pairs[:, 1] >= len(greys))).any())


def test_nothing_that_the_emoji_set_holds_out_is_in_any_split(greys, listed, held_out_emoji):
    held_out = {(emoji_name(label).name, family) for label, family in held_out_emoji.cells}
    for split in SPLITS:
        names = {(row["name"], EMOJI_FAMILIES.get(row["set"])) for row in listed[split]}
        assert not names & held_out
        assert not is_near_any(greys[split], held_out_emoji.greys)


def test_what_the_emoji_set_trains_on_is_held_out_nowhere(greys, listed, held_out_emoji):
    for split in HELD_OUT:
        assert not {row["set"] for row in listed[split]} & EMOJI_FAMILIES.keys()
        assert not is_near_any(greys[split], held_out_emoji.train_greys)


def test_every_held_out_name_has_another_family_in_train(listed):
    families = defaultdict(set)
    for family, name in cells_of(listed["train"]):
        families[name].add(family)
    for split in ("validation", "test"):
        for family, name in cells_of(listed[split]):
            assert families[name] - {family}, f"{name} of {family} in {split}"


def test_held_out_families_stand_in_their_split_alone(listed):
    families = {split: {row["family"] for row in listed[split]} for split in SPLITS}
    assert families["test_family"] == set(TEST_FAMILIES)
    assert not set().union(*(families[split] for split in SPLITS if split != "test_family")) & set(TEST_FAMILIES)
    for family in TEST_FAMILIES:
        cells = {cell for cell in cells_of(listed["test_family"]) if cell[0] == family}
        assert 0 < len(cells) <= CELLS_PER_FAMILY


def test_held_out_words_and_pairs_stand_in_nothing_that_trains(rows, listed, phrases, held_out_emoji):
    held_out = HeldOutWords([*phrases["words"], *phrases["pairs"]])
    names = {row["name"] for split in ("train", "validation", "test") for row in listed[split]}
    texts = {text for row in rows["train"] for field in ("aliases", "keywords", "categories") for text in row[field]}
    texts |= {row[field] for row in rows["train"] for field in ("style", "label")}
    assert not [text for text in (*names, *texts, *held_out_emoji.train_texts) if held_out.found_in(text)]


def test_held_out_phrases_are_what_their_splits_show(listed, phrases):
    for split, kind in (("test_words", "words"), ("test_pairs", "pairs")):
        held_out = HeldOutWords(phrases[kind])
        names = {row["name"] for row in listed[split]}
        assert all(held_out.found_in(name) for name in names)
        assert set(phrases[kind]) <= names


def test_both_words_of_every_pair_are_seen_in_train(listed, phrases):
    seen = defaultdict(int)
    for row in listed["train"]:
        for word in stems(row["name"]):
            seen[word] += 1
    assert min(seen[word] for pair in phrases["pairs"] for word in stems(pair)) >= SplitSizes().least_seen / 2


def test_painted_images_have_the_colour_that_they_state(rows):
    for row in rows["test"]:
        if row["colour"] is not None:
            ink = 255 - row["pixels"].reshape(-1, 3).astype(float)
            colour = 255 - np.array(COLOURS[row["colour"]], dtype=float)
            share = ink.sum(axis=0) @ colour / np.linalg.norm(ink.sum(axis=0)) / np.linalg.norm(colour)
            assert share > 0.97, (row["set"], row["icon"], row["colour"])


def test_attribution_names_every_set_with_its_licence(rows, listed):
    page = (FOLDER / "LICENSES" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert {row["set"] for split in SPLITS for row in listed[split]} <= lines.keys()
    for split in SPLITS:
        for row in rows[split]:
            assert row["license"] in LICENSES and row["license"] in lines[row["set"]]
    licences = (FOLDER / "LICENSES" / "README.md").read_text(encoding="utf-8")
    for licence in LICENSES:
        assert (FOLDER / "LICENSES" / f"{licence}.txt").exists() and f"{licence}.txt" in licences
    for name, version in ICON_PACKAGES.items():
        assert f"{name} {version}" in licences


def test_card_counts_are_those_of_the_list(listed):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for split in SPLITS:
        names = {row["name"] for row in listed[split]}
        sets = {row["set"] for row in listed[split]}
        numbers = (len(listed[split]), len(cells_of(listed[split])), len(names), len(sets))
        assert f"| {split} | " + " | ".join(f"{number:,}" for number in numbers) + " |" in card
