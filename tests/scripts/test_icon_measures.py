# SPDX-License-Identifier: Apache-2.0
"""Each measure of a model of icons against plain loops, and what it is taken on."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import config

from helpers.icons import NAMES, icon, write_icons
from helpers.tiny import tiny_model
from icon_evaluation.measures import (
    Query,
    chance,
    fit_judge,
    lexical_scores,
    name_figures,
    queries_of,
    recall,
    tag_figures,
    tags_by_name,
)
from icon_evaluation.samples import (
    HELD_OUT,
    TrainIcons,
    caption,
    nearest,
    open_split,
    order,
    read_train_icons,
    take_sample,
)
from modeling_moma.errors_moma import InputError


def mean_colour(images):
    return images.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("icons")
    write_icons(folder, ("train", *HELD_OUT))
    return folder


@pytest.fixture(scope="module")
def parts(processor):
    return tiny_model(processor, num_experts={"text": 3, "image": 2}, initializer_range=0.3), processor


def test_the_sample_of_a_split_is_chosen_by_hash_and_grows_with_its_limit(data, parts):
    processor = parts[1]
    few, more = (take_sample(str(data), "test", limit, processor, mean_colour, 4) for limit in (5, 9))
    assert few.rows == more.rows[:5] and torch.equal(few.codes, more.codes[:5])
    assert few.features.shape == (5, 3) and len(torch.cat(few.images)) == 5
    keys = take_sample(str(data), "test", 9, processor, mean_colour, 4, lambda row: row["name"] == "key")
    assert {row["name"] for row in keys.rows} == {"key"}
    assert caption(icon(0)) == "house (tabler, filled)"
    assert caption(icon(1), True) == "red apple (tabler, filled, red)"
    assert caption(icon(0), True) == caption(icon(0))


def test_icons_that_came_after_a_sample_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "icons"
    folder.mkdir()
    write_icons(folder, ("train",))
    files = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n"
    (folder / "README.md").write_text(f"---\n{files}---\n")
    assert len(open_split(str(folder), "train")) == 12
    shutil.copy(folder / "data" / "train-00000-of-00001.parquet", folder / "data" / "train-00001-of-00002.parquet")
    assert len(open_split(str(folder), "train")) == 24


def test_names_are_compared_by_their_words():
    rows = [icon(0), icon(1), icon(3), icon(3)]
    found = [["home"], ["key", "Red-Apple"], ["clouds", *"abcd", "cloud off"], []]
    assert name_figures(found, rows) == {**{"top1": 0.0, "top5": 0.25, "word_in_common": 0.25}}


def test_tags_are_counted_among_the_first_eight():
    rows = [icon(0, keywords=["Building", "roof", "door", "wall"]), icon(1, keywords=["fruit"])]
    found = [["building", "wall", "fruit"], [*"abcdefgh", "fruit"]]
    assert tag_figures(found, rows) == {"recall": 0.25, "precision": 0.125}


def train_icons(count, features=None):
    rows = [icon(number) for number in range(count)]
    columns = {name: [row[name] for row in rows] for name in ("set", "icon", "name", "family", "keywords")}
    if features is None:
        features = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
    return TrainIcons(columns, features, np.arange(count))


def test_neighbours_are_those_of_a_loop_whatever_is_compared_at_once(monkeypatch):
    train, wanted = train_icons(30), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    families = [f"family{number}" for number in (0, 1, 2, 3, 9)]
    expected = []
    for vector, family in zip(wanted, families):
        others = [row for row in range(30) if train.columns["family"][row] != family]
        score = F.cosine_similarity(vector[None], torch.from_numpy(train.features)).tolist()
        expected.append([train.row(row) for row in sorted(others, key=lambda row: -score[row])[:7]])
    for size in (4, 16_384):
        monkeypatch.setattr("icon_evaluation.samples.CHUNK", size)
        assert nearest(train, wanted, families, kept=7) == expected
    assert all(row["family"] != "family0" for row in nearest(train, wanted[:1], families[:1])[0])


def test_features_are_those_of_the_first_icons_by_hash_and_kept_in_a_file(tmp_path, data, parts):
    processor, path = parts[1], tmp_path / "kept" / "features.npy"
    train, calls = open_split(str(data), "train"), []

    def extract(pixel_values):
        calls.append(len(pixel_values))
        return pixel_values.flatten(1).double().mean(1, keepdim=True).expand(-1, 5)

    for _ in range(2):
        found = read_train_icons(train, processor, extract, 3, file=str(path))
    assert sum(calls) == len(train) and found.rows.tolist() == list(range(len(train)))
    some = read_train_icons(train, processor, extract, 4, limit=5)
    first = sorted(range(len(train)), key=lambda row: order(train[row]["set"], train[row]["icon"]))[:5]
    assert some.rows.tolist() == sorted(first)
    np.testing.assert_allclose(some.features, found.features[some.rows], rtol=1e-6)
    with pytest.raises(InputError, match=f"those of {len(train)} images, and 2 are asked for"):
        read_train_icons(train, processor, extract, 3, limit=2, file=str(path))


def test_queries_are_tags_and_aliases_that_no_word_of_the_name_tells():
    rows = [
        icon(0, icon="home-2", keywords=["buildings"], aliases=["home"]),
        icon(1, icon="apple", keywords=["building", "fruit"]),
        icon(2, name="building", icon="castle", keywords=["building", "red fruit"]),
    ]
    found = {query.text: query for query in queries_of(rows, 9)}
    assert set(found) == {"buildings", "building", "fruit", "red fruit"}
    assert found["building"] == Query("building", frozenset([1]), frozenset([2]))
    assert [query.text for query in queries_of(rows, 2)] == sorted(found, key=order)[:2]


def test_recall_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, 4, (20, 6)).astype(float))
    scores[scores == 0] = -torch.inf
    sets = [frozenset(rng.choice(20, 6, replace=False).tolist()) for _ in range(6)]
    queries = [Query("", frozenset(sorted(found)[:3]), frozenset(sorted(found)[3:])) for found in sets]
    shares = []
    for column, query in enumerate(queries):
        results = [row for row in range(20) if row not in query.left_out and scores[row, column] > 0]
        first = sorted(results, key=lambda row: (-scores[row, column].item(), row))[:4]
        shares.append(len(query.wanted & set(first)) / 3)
    assert recall(scores, queries, top=4) == pytest.approx(np.mean(shares))
    assert chance(20, queries, top=4) == pytest.approx(4 / 17)


def test_the_lexical_search_finds_words_in_either_number_and_nothing_else():
    queries = [Query(text, frozenset([0]), frozenset()) for text in ("clouds", "dragon")]
    scores = lexical_scores(["cloud-off cloud off", "key", "cloud castle with a long name"], queries)
    assert scores[:, 0].argsort(descending=True).tolist() == [0, 2, 1]
    assert scores[1, 0] == -torch.inf and (scores[:, 1] == -torch.inf).all()
    tags = tags_by_name({"name": ["Red apple", "red apple", "key"], "keywords": [["a", "b"], ["b", "c"], []]})
    assert tags == {"red apple": ["a", "b", "c"], "key": []}


def test_the_judge_learns_names_that_features_tell_and_knows_no_others():
    rng, labels = np.random.default_rng(0), np.arange(200) % len(NAMES)
    centres = np.eye(len(NAMES), 6) * 8
    train = train_icons(200, (centres[labels] + rng.normal(size=(200, 6))).astype(np.float32))
    judge = fit_judge(train, num_names=4)
    assert judge.names == NAMES[:4] and judge.train_images == 160
    held_out = torch.from_numpy(centres[[0, 1, 2, 3]]).float()
    assert judge.figures(held_out, NAMES[:4])["top1"] == 1
    assert judge.figures(held_out, NAMES[3::-1])["top1"] == 0
    with pytest.raises(ValueError, match="too few"):
        fit_judge(train, num_names=1)
