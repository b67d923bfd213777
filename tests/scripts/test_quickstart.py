# SPDX-License-Identifier: Apache-2.0

import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForCausalLM

import quickstart
from helpers.released import RELEASED, skip_without_released_model
from helpers.tiny import tiny_model, tiny_processor


SIDE = 16


@pytest.fixture
def model_folder(tmp_path):
    processor = tiny_processor()
    tiny_model(processor, num_experts={"text": 2, "image": 3}).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data_folder(tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        "image": [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(6)],
        "style": ["noto"] * 6,
        "label": ["apple"] * 6,
        "keywords": [["fruit", "red"]] * 6,
    }
    for split in ("train", "validation", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_dict(rows).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "data"


def test_everything_is_written_reported_and_loads_again(model_folder, data_folder, tmp_path, capsys):
    output = tmp_path / "output"
    arguments = ["--model", model_folder, "--data", data_folder, "--output", output, "--images", "4"]
    arguments += ["--fine-tune-steps", "2", "--batch-size", "4"]
    quickstart.main(list(map(str, arguments)))
    printed = capsys.readouterr().out
    for name in ("contact_sheet.png", "routing.png", "contact_sheet_fine_tuned.png"):
        with Image.open(output / name) as image:
            assert image.width > 400 and len(image.convert("RGB").getcolors(2**24)) > 10
        assert name in printed
    assert not list(output.glob(".*.partial"))
    assert printed.count("noto: apple") == 8
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_folder, output / "fine-tuned"))
    assert f"{before.config.num_parameters():,} parameters" in printed
    # fine-tuning has changed the weights, and they have been saved
    first, second = (model.model.layers[0].self_attn.q_proj.weight for model in (before, after))
    assert not torch.equal(first, second)


def test_rows_depend_on_the_seed_alone(data_folder):
    labels = [quickstart.pick_rows(str(data_folder), "test", 3, seed)["image"][0].tobytes() for seed in (0, 0, 1)]
    assert labels[0] == labels[1]
    assert len(quickstart.pick_rows(str(data_folder), "test", 100, 0)) == 6


def test_a_missing_folder_is_named_and_not_looked_for_on_the_hub(data_folder, capsys):
    with pytest.raises(SystemExit):
        quickstart.parse_arguments(["--model", "no/such/model", "--data", str(data_folder)])
    assert "no/such/model" in capsys.readouterr().err


def test_losses_that_a_newcomer_sees_are_those_of_the_card(tmp_path, capsys, monkeypatch):
    skip_without_released_model()
    # one step reads few images, and losses need no captions
    monkeypatch.setattr(quickstart, "FINE_TUNE_IMAGES", 16)
    monkeypatch.setattr(quickstart, "CAPTION_TOKENS", 2)
    arguments = ["--model", RELEASED, "--data", RELEASED.parents[1] / "data" / "emoji", "--output", tmp_path]
    arguments += ["--images", "1", "--fine-tune-steps", "1", "--batch-size", "16"]
    quickstart.main(list(map(str, arguments)))
    logged = re.findall(r"'(eval_\w*loss)': '([\d.]+)'", capsys.readouterr().out)
    card = json.loads((RELEASED / "evaluation.json").read_text())["loss"]["causal"]
    expected = {"eval_loss": card["overall"], "eval_text_loss": card["text"], "eval_image_loss": card["image"]}
    assert {name for name, _ in logged} == expected.keys()
    # of other images, and before and after a step
    assert all(abs(float(loss) - expected[name]) < 0.1 for name, loss in logged), logged
