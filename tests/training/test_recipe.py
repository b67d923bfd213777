# SPDX-License-Identifier: Apache-2.0
"""Recipes: those that ship are read whole, flags win over them, and what nothing knows is refused by name."""

from pathlib import Path

import pytest

from helpers.tiny import tiny_processor
from modeling_moma import MomaConfig
from modeling_moma.cli.pretrain import FLAGS, parse_arguments
from modeling_moma.training.pretraining import make_training_arguments
from modeling_moma.training.recipe import read_recipe


RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
PATHS = ["--processor", "p", "--codes", "c", "--output", "o"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_that_ship_give_a_model_and_a_training(path):
    recipe = read_recipe(path)
    config = MomaConfig(**recipe.model, **tiny_processor().token_layout())
    assert config.num_parameters() > 0
    args = parse_arguments([*PATHS, "--recipe", str(path)])
    settings = make_training_arguments(args)
    for name, value in recipe.trainer.items():
        assert getattr(settings, name) == value, name


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = write(tmp_path, "model: {}\ntrainer: {max_steps: 7, learning_rate: 0.5, adam_beta2: 0.9, bf16: false}\n")
    args = parse_arguments([*PATHS, "--recipe", path, "--learning-rate", "0.25", "--bf16", "on"])
    assert (args.steps, args.learning_rate, args.batch_size) == (7, 0.25, FLAGS["per_device_train_batch_size"][1])
    settings = make_training_arguments(args)
    assert (settings.max_steps, settings.learning_rate, settings.adam_beta2) == (7, 0.25, 0.9)
    assert settings.bf16 is False


@pytest.mark.parametrize(
    "text, message",
    [
        ("hidden_size: 8\n", "got hidden_size: are the fields of the model not under `model:`"),
        ("model: {hiden_size: 8}\n", "model: 'hiden_size' is no field of MomaConfig"),
        ("model: {}\ntrainer: {max_step: 8}\n", "trainer: 'max_step' is no field of TrainingArguments"),
        ("model: {}\ntrainer: {output_dir: x}\n", "trainer: 'output_dir'"),
        ("model: [1]\n", "model: .*no field of MomaConfig"),
        ("- 1\n", "got list"),
        ("model: {\n", "cannot be read as YAML"),
    ],
)
def test_what_nothing_knows_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(write(tmp_path, text))


def test_missing_recipe_is_named():
    with pytest.raises(ValueError, match="nowhere.yaml"):
        read_recipe("nowhere.yaml")
