# SPDX-License-Identifier: Apache-2.0
"""All measures of a model of icons, on a tiny random one, with its sheet and its card."""

import json

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image

import build_typical_icons
import evaluate_icons
from helpers.icons import write_icons
from helpers.tiny import tiny_model, tiny_processor
from icons_recipe import measuring
from icons_recipe.samples import HELD_OUT
from modeling_moma.cli import main as moma
from modeling_moma.errors_moma import InputError


def patches(images):
    """Features that tell images of noise apart."""
    return F.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("icons")
    write_icons(folder, ("train", *HELD_OUT))
    return folder


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory):
    """The folder of a tiny model after an evaluation that writes its card."""
    emoji = tmp_path_factory.mktemp("emoji")
    write_icons(emoji, ["test"])
    folder = tmp_path_factory.mktemp("model")
    processor = tiny_processor()
    model = tiny_model(processor, num_experts={"text": 3, "image": 2}, initializer_range=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert moma.main(["build-memory", str(data), "--model", str(folder), "--tags", "keywords"]) == 0
    painted, typical = (tmp_path_factory.mktemp(name) for name in ("painted", "typical"))
    write_icons(painted, ["train"], colour="red")
    assert build_typical_icons.main(["--model", str(folder), "--data", str(painted), "--output", str(typical)]) == 0
    patch = pytest.MonkeyPatch()
    patch.setattr(measuring, "feature_extractor", lambda device: patches)
    sizes = {"limit": 5, "ranked": 2, "queries": 3, "drawings": 8, "seeds": 2, "sheet": 3, "batch-size": 8, "views": 2}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    try:
        status = evaluate_icons.main(
            ["--model", str(folder), "--control", str(folder), "--data", str(data), "--write-card"]
            + ["--emoji", str(emoji), "--typical", str(typical), *words]
        )
    finally:
        patch.undo()
    assert status == 0
    return folder


def test_everything_is_measured_and_shown(measured):
    report = json.loads((measured / "evaluation.json").read_text())
    for name in ("names", "tags", "search"):
        assert list(report[name]) == list(HELD_OUT)
    assert report["names"]["test"]["images"] == 5 and report["names"]["test"]["ranked"]["names"] == 5
    assert len(report["names"]["test"]["samples"]) == 5
    for search in report["search"]["test"].values():
        scores = ("model", "bm25_names", "bm25_names_and_tags", "bm25_neighbours", "chance")
        assert all(0 <= search[name] <= 1 for name in (*scores, "with_memory", "with_file_names"))
    assert report["memory"]["images"] > 2 and report["memory"]["share"] == 0.5
    for kind, name in (("names", "top5"), ("tags", "recall")):
        assert all(0 <= report[kind]["test"][key][name] <= 1 for key in ("with_memory", "with_memory_of_views"))
    assert report["search"]["test"]["unnamed"]["bm25_names"] == 0
    assert report["views"] == 2 and 0 <= report["tags"]["test"]["model_of_views"]["recall"] <= 1
    assert {split: found["images"] for split, found in report["fit"].items()} == {"train": 5, "test": 5}
    assert report["emoji"]["images"] == 12 and 0 <= report["emoji"]["model"]["top5"] <= 1
    drawings = report["drawings"]
    assert drawings["captions"] == 8 and len(drawings["by_seed"]) == 2
    assert drawings["drawn"]["top1"] == pytest.approx(np.mean(drawings["by_seed"]))
    typical = drawings["typical"]
    assert typical["settings"]["guidance_scale"] == 1 and drawings["settings"]["guidance_scale"] == 5
    assert typical["originals"] == drawings["originals"] and len(typical["by_seed"]) == 2
    assert 0 <= typical["known"]["drawn"]["of_their_name"] <= typical["known"]["drawn"]["any"] <= 1
    information = report["information"]["plain"]
    assert information["model"] == information["control"]
    assert {name: len(shares) for name, shares in report["coverage"].items()} == {"text": 2, "image": 2}
    sheet = Image.open(measured / "samples.png")
    assert sheet.width > 3 * 3 * 128
    card = (measured / "README.md").read_text()
    assert report["command"] in card and "samples.png" in card and "--control" in report["command"]


def test_the_evaluation_is_the_same_twice(data, measured):
    words = ["--model", str(measured), "--data", str(data), "--limit", "5", "--drawings", "8", "--ranked", "2"]
    words += ["--views", "2"]
    evaluation = measuring.Evaluation(evaluate_icons.parse_arguments([*words, "--seeds", "2"]), patches)
    report = json.loads((measured / "evaluation.json").read_text())
    near = evaluation.neighbours()["test_words"]
    assert evaluation.names(evaluation.samples["test_words"], near) == report["names"]["test_words"]
    assert evaluation.fit() == report["fit"]
    assert evaluation.drawings()["by_seed"] == report["drawings"]["by_seed"]


def test_neighbours_of_an_earlier_report_are_those_that_are_computed(data, measured, tmp_path):
    words = ["--model", str(measured), "--data", str(data), "--limit", "5", "--drawings", "8", "--ranked", "2"]
    words += [
        "--views",
        "2",
        "--seeds",
        "2",
        "--emoji",
        "",
        "--queries",
        "3",
        "--neighbours",
        str(measured / "evaluation.json"),
    ]
    earlier = json.loads((measured / "evaluation.json").read_text())
    del earlier["drawings"]["typical"]
    report = measuring.Evaluation(evaluate_icons.parse_arguments(words), patches).run()
    for name in ("neighbour_images", "train_icons", "names", "tags", "search", "drawings"):
        assert report[name] == earlier[name], name
    with pytest.raises(InputError, match="--neighbours: the report is of other icons"):
        measuring.take_neighbours(report | {"train_icons": 7}, earlier)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="--neighbours '.*other.json' is no report of this script .KeyError"):
        measuring.read_report(str(tmp_path / "other.json"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--drawings", "7"], "--drawings 7: it must be at least 8"),
        (["--temperature", "0"], "--temperature 0.0: it must be above 0"),
        (["--temperature", "nan"], "--temperature nan: it must be above 0"),
        (["--guidance-scale", "inf"], "--guidance-scale inf: it must be a finite number"),
        (["--output", "."], "is a folder; name a file in it"),
        (["--emoji", "nowhere"], "--emoji 'nowhere' is no folder"),
    ],
)
def test_an_evaluation_that_could_not_end_does_not_begin(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate_icons.parse_arguments(["--model", "here", *arguments])
    assert message in capsys.readouterr().err


def test_data_that_are_none_are_one_line(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "feature_extractor", lambda device: patches)
    words = ["--model", str(measured), "--data", str(tmp_path / "nowhere"), "--emoji", "", "--views", "2"]
    assert evaluate_icons.main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "nowhere' is no folder: `make data` builds icons and emoji" in line
