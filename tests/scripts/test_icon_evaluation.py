# SPDX-License-Identifier: Apache-2.0
"""All measures of a model of icons, on a tiny random one, with its sheet and its card."""

import json

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image

import build_typical_icons
import evaluate_icons
from helpers.icons import NAMES, icon, write_icons
from helpers.slow import slow
from helpers.tiny import tiny_model
from icon_evaluation.samples import HELD_OUT, order
from modeling_moma.cli import main as moma


def patches(images):
    """Features that tell images of noise apart."""
    return F.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("icons")
    write_icons(folder, ("train", *HELD_OUT))
    return folder


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(processor, num_experts={"text": 3, "image": 2}, initializer_range=0.3).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(data, folder, tmp_path_factory):
    """The folder after an evaluation that writes its card."""
    assert moma.main(["build-memory", str(data), "--model", str(folder), "--tags", "keywords"]) == 0
    painted, typical = (tmp_path_factory.mktemp(name) for name in ("painted", "typical"))
    write_icons(painted, ["train"], colour="red")
    assert build_typical_icons.main(["--model", str(folder), "--data", str(painted), "--output", str(typical)]) == 0
    words = ["--model", folder, "--data", data, "--typical", typical, "--write-card"]
    words += ["--limit", 8, "--seeds", 2, "--batch-size", 8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_icons, "feature_extractor", lambda device: patches)
        assert evaluate_icons.main(list(map(str, words))) == 0
    return folder


@slow
def test_everything_is_measured_and_shown(measured):
    report = json.loads((measured / "evaluation.json").read_text())
    for name in ("names", "tags", "search"):
        assert list(report[name]) == list(HELD_OUT)
    assert report["names"]["test"]["images"] == 8
    for search in report["search"]["test"].values():
        scores = ("model", "bm25_names", "bm25_names_and_tags", "bm25_neighbours", "chance")
        assert all(0 <= search[name] <= 1 for name in (*scores, "with_memory", "with_file_names"))
    assert report["memory"]["images"] > 2 and report["memory"]["share"] == 0.5
    for kind, name in (("names", "top5"), ("tags", "recall")):
        for key in ("model", "model_of_views", "with_memory", "with_memory_of_views", "nearest_neighbour"):
            assert 0 <= report[kind]["test"][key][name] <= 1
    assert report["search"]["test"]["unnamed"]["bm25_names"] == 0
    drawings = report["drawings"]
    assert drawings["captions"] == 8 and len(drawings["by_seed"]) == 2
    assert drawings["drawn"]["top1"] == pytest.approx(np.mean(drawings["by_seed"]))
    typical = drawings["typical"]
    assert typical["settings"]["guidance_scale"] == 1 and drawings["settings"]["guidance_scale"] == 5
    assert typical["originals"] == drawings["originals"] and len(typical["by_seed"]) == 2
    assert 0 <= typical["known"]["drawn"]["of_their_name"] <= typical["known"]["drawn"]["any"] <= 1
    assert Image.open(measured / "samples.png").width > 3 * 3 * 128
    card = (measured / "README.md").read_text()
    assert report["command"] in card and "samples.png" in card and "--limit 8" in report["command"]


def test_the_evaluation_is_the_same_twice(data, measured):
    words = ["--model", str(measured), "--data", str(data), "--limit", "8", "--seeds", "2"]
    evaluation = evaluate_icons.Evaluation(evaluate_icons.parse_arguments(words), patches)
    report = json.loads((measured / "evaluation.json").read_text())
    near = evaluation.neighbours()["test_words"]
    assert evaluation.names(evaluation.samples["test_words"], near) == report["names"]["test_words"]
    assert evaluation.drawings()["by_seed"] == report["drawings"]["by_seed"]


def test_the_sheet_shows_each_name_once():
    rows = [icon(number) for number in range(12)]
    places = evaluate_icons.rows_of_names(rows, 3)
    assert [rows[place]["name"] for place in places] == sorted(NAMES, key=order)[:3] and max(places) < 5


def test_bad_arguments_are_one_line(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        evaluate_icons.parse_arguments(["--model", "here", "--limit", "7"])
    assert "--limit 7: it must be at least 8" in capsys.readouterr().err
    monkeypatch.setattr(evaluate_icons, "feature_extractor", lambda device: patches)
    words = ["--model", str(folder), "--data", str(tmp_path / "nowhere")]
    assert evaluate_icons.main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "nowhere' is no folder: `make data` builds icons and emoji" in line
