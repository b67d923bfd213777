# SPDX-License-Identifier: Apache-2.0

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForCausalLM

import quickstart
from helpers.released import skip_without_released_model
from helpers.slow import slow
from helpers.tiny import tiny_model


ROOT = Path(__file__).resolve().parents[2]
EMOJI = ROOT / "model_cards" / "moma-emoji"
SIDE = 16
RECIPE = """
sources:
  icons:
    data: data/icons
    image: picture
    text: "{name} ({style})"
    alternatives: [{text: "tags: {keywords}", share: 0.5}]
"""
# of all of `test_family`, in nats, by `moma evaluate --model model_cards/moma-icons --split test_family
# --sources icons --measures losses --tokens TOKENS` of tokens by recipes/moma-icons.yaml
ICONS_LOSSES = {"eval_loss": 3.8688, "eval_text_loss": 4.5234, "eval_image_loss": 3.7363}


@pytest.fixture
def model_folder(tmp_path, processor):
    tiny_model(processor, num_experts={"text": 2, "image": 3}).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data_folder(tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        "picture": [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(6)],
        "style": ["noto"] * 6,
        "name": ["apple"] * 6,
        "keywords": [["fruit", "red"]] * 6,
    }
    for split in ("train", "validation", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_dict(rows).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "data"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def source(recipe, data_folder):
    arguments = ["--model", str(EMOJI), "--recipe", str(recipe), "--data", str(data_folder)]
    return quickstart.parse_arguments(arguments).source


def test_everything_is_written_reported_and_loads_again(model_folder, data_folder, recipe, tmp_path, capsys):
    output = tmp_path / "output"
    arguments = ["--model", model_folder, "--recipe", recipe, "--data", data_folder, "--output", output]
    arguments += ["--images", "4", "--query", "red apple"]
    arguments += ["--fine-tune-steps", "2", "--batch-size", "4"]
    quickstart.main(list(map(str, arguments)))
    printed = capsys.readouterr().out
    for name in ("contact_sheet.png", "routing.png", "contact_sheet_fine_tuned.png"):
        with Image.open(output / name) as image:
            assert image.width > 400 and len(image.convert("RGB").getcolors(2**24)) > 10
        assert name in printed
    assert not list(output.glob(".*.partial"))
    # what is drawn first, four captions, four rows of names, five of the six images found; then the first two again
    assert printed.count("apple (noto)") == (1 + 4 + 4 + 5) + (1 + 4)
    assert printed.count("of 6 held-out images those that 'red apple' fits best") == 1
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_folder, output / "fine-tuned"))
    assert f"{before.config.num_parameters():,} parameters" in printed
    # fine-tuning has changed the weights, and they have been saved
    first, second = (model.model.layers[0].self_attn.q_proj.weight for model in (before, after))
    assert not torch.equal(first, second)


def test_rows_depend_on_the_seed_alone(source):
    rows = [quickstart.pick_rows(source, "test", 3, seed)["picture"][0].tobytes() for seed in (0, 0, 1)]
    assert rows[0] == rows[1]
    assert len(quickstart.pick_rows(source, "test", 100, 0)) == 6


def test_typical_icons_are_drawn_by_the_released_model(data_folder, recipe):
    released = quickstart.parse_arguments(["--recipe", str(recipe), "--data", str(data_folder)])
    assert released.drawing.render({"name": "apple", "style": "noto"}) == "apple (typical)"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "no/such/model"], "--model: there is no model in a folder 'no/such/model'"),
        (["--seed", "-1"], "--seed -1: it must be at least 0"),
        (["--output", "text.yaml"], "text.yaml"),
        (["--recipe", "text.yaml"], "its first source, 'words', has no images with captions"),
        (["--data", "part"], "has no split 'validation', but ['train', 'test']"),
    ],
)
def test_bad_arguments_are_one_line(model_folder, data_folder, recipe, tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    Path("text.yaml").write_text("sources: {words: {data: words, text: text}}")
    shutil.copytree(data_folder, "part", ignore=shutil.ignore_patterns("validation-*"))
    defaults = ["--model", model_folder, "--recipe", recipe, "--data", data_folder]
    with pytest.raises(SystemExit):
        quickstart.parse_arguments(list(map(str, [*defaults, *arguments])))
    assert told in capsys.readouterr().err


@slow
def test_what_a_newcomer_sees_are_losses_of_a_held_out_split_and_names(tmp_path, capsys, monkeypatch):
    skip_without_released_model()
    monkeypatch.chdir(ROOT)
    # one step reads few images
    monkeypatch.setattr(quickstart, "FINE_TUNE_IMAGES", 16)
    monkeypatch.setattr(quickstart, "SEARCHED_IMAGES", 16)
    arguments = ["--output", tmp_path, "--images", "4", "--fine-tune-steps", "1", "--batch-size", "16"]
    quickstart.main(list(map(str, arguments)))
    printed = capsys.readouterr().out
    logged = [(name, float(loss)) for name, loss in re.findall(r"'(eval_\w*loss)': '([\d.]+)'", printed)]
    before, after = dict(logged[:3]), dict(logged[3:])
    assert before.keys() == after.keys() == ICONS_LOSSES.keys()
    # some of the images
    assert all(abs(loss - ICONS_LOSSES[name]) < 0.5 for name, loss in before.items()), before
    # makers' styles are learnt from the first step on
    assert after["eval_text_loss"] < before["eval_text_loss"] - 0.05, (before, after)
    shown = [line.split(" | ")[:2] for line in printed.splitlines() if re.match(r"  .*\) +\| [^|]*$", line)]
    true, captions = zip(*shown, strict=True)
    assert len(captions) == 8 and all("(" in caption for caption in captions), captions
    # new images, and others before them
    assert true[4:] != true[:4]
    assert f"a token of modality text costs {after['eval_text_loss']:.2f} nats" in printed


def test_what_measures_a_fine_tuning_is_not_learnt_in_it(model_folder, data_folder, recipe, monkeypatch):
    arguments = list(map(str, ["--model", model_folder, "--recipe", recipe, "--data", data_folder]))
    splits = ("train", "validation", "test", "test_family")
    files = "".join(f"  - {{split: {split}, path: {split}-*}}\n" for split in splits)
    (data_folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    rng = np.random.default_rng(1)
    for count, learnt, held_out in ((3, 2, 1), (20, 18, 2), (60, 45, 5)):
        pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
        rows = {name: [name] * count for name in ("style", "name")} | {"keywords": [["red"]] * count}
        rows["picture"] = [Image.fromarray(image) for image in pixels]
        Dataset.from_dict(rows).to_parquet(data_folder / "test_family-00000-of-00001.parquet")
        monkeypatch.setattr(quickstart, "FINE_TUNE_IMAGES", 45)
        monkeypatch.setattr(quickstart, "EVALUATION_IMAGES", 5)
        parts = quickstart.fine_tuning_rows(quickstart.parse_arguments(arguments))
        assert [len(part) for part in parts] == [learnt, held_out]
        images = [image.tobytes() for part in parts for image in part["picture"]]
        assert len(set(images)) == learnt + held_out


@slow
def test_the_model_of_emoji_is_shown_by_its_own_recipe_with_the_losses_of_its_card(tmp_path, capsys, monkeypatch):
    skip_without_released_model()
    monkeypatch.chdir(ROOT)
    # one step reads few images, and losses need no captions
    monkeypatch.setattr(quickstart, "FINE_TUNE_IMAGES", 16)
    monkeypatch.setattr(quickstart, "CAPTION_TOKENS", 2)
    monkeypatch.setattr(quickstart, "SEARCHED_IMAGES", 4)
    arguments = ["--model", EMOJI, "--recipe", "recipes/emoji.yaml", "--output", tmp_path, "--images", "1"]
    arguments += ["--name-prompt", "noto:", "--tag-prompt", "noto tags:", "--fine-tune-steps", "1"]
    quickstart.main(list(map(str, [*arguments, "--batch-size", "16"])))
    logged = re.findall(r"'(eval_\w*loss)': '([\d.]+)'", capsys.readouterr().out)
    card = json.loads((EMOJI / "evaluation.json").read_text())["loss"]["causal"]
    expected = {"eval_loss": card["overall"], "eval_text_loss": card["text"], "eval_image_loss": card["image"]}
    assert {name for name, _ in logged} == expected.keys()
    assert all(abs(float(loss) - expected[name]) < 0.1 for name, loss in logged), logged
