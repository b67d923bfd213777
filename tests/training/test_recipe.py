# SPDX-License-Identifier: Apache-2.0
"""Recipes: those that ship are read whole, `--set` wins over them, and what nothing knows is refused by name."""

import re
from pathlib import Path

import pytest

from helpers.sounds import processor_of_sounds
from helpers.tiny import tiny_processor, trainer_flags
from modeling_moma.cli.pretrain import parse_arguments
from modeling_moma.errors_moma import InputError
from modeling_moma.training.muon import MUON
from modeling_moma.training.pretraining import starting_config
from modeling_moma.training.recipe import read_recipe
from modeling_moma.training.trainer_settings import make_training_arguments, uses_muon


RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
PATHS = ["--processor", "p", "--tokens", "c", "--output", "o"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_that_ship_give_a_model_and_a_training(path):
    recipe = read_recipe(path)
    # those without a model are for one that is there already
    args = parse_arguments([str(path), *PATHS, *([] if recipe.model else ["--model", "m"])])
    processor = processor_of_sounds() if recipe.audio_tokenizer else tiny_processor()
    config = starting_config(None, recipe, processor)
    assert config.num_parameters() > 0
    settings = make_training_arguments(args)
    for name, value in recipe.trainer.items():
        # Trainer knows no Muon
        assert (MUON if name == "optim" and uses_muon(args) else getattr(settings, name)) == value, name
    if recipe.data is not None:
        assert recipe.data.sequence_length <= config.max_position_embeddings


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "text, expected", [('"no"', False), ("no", False), ("steps", True), ('"no", eval_on_start: true', True)]
)
def test_a_training_that_is_not_evaluated_does_not_begin_with_an_evaluation(tmp_path, text, expected):
    recipe = write(tmp_path, f"model: {{hidden_size: 8}}\ntrainer: {{eval_strategy: {text}}}\n")
    assert make_training_arguments(parse_arguments([*PATHS, recipe])).eval_on_start is expected


def test_set_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    text = "model: {hidden_size: 8}\ntrainer: {max_steps: 7, learning_rate: 0.5, adam_beta2: 0.9, bf16: false}\n"
    args = parse_arguments([*PATHS, write(tmp_path, text), *trainer_flags(learning_rate=0.25, bf16=True)])
    settings = make_training_arguments(args)
    assert (settings.max_steps, settings.learning_rate, settings.adam_beta2) == (7, 0.25, 0.9)
    assert settings.bf16 is True and settings.per_device_eval_batch_size == 32


@pytest.mark.parametrize(
    "changes, trainer, found",
    [
        ({"bf16": False}, "{bf16: true}", {"bf16": False, "fp16": False}),
        ({}, "{fp16: true}", {"bf16": False, "fp16": True}),
        ({"save_total_limit": 3}, "{save_total_limit: null}", {"save_total_limit": 3}),
        ({"seed": 1}, "{save_total_limit: null}", {"save_total_limit": None, "seed": 1}),
    ],
)
def test_precisions_and_fields_without_a_value_are_read(tmp_path, changes, trainer, found):
    path = write(tmp_path, f"model: {{hidden_size: 8}}\ntrainer: {trainer}\n")
    settings = make_training_arguments(parse_arguments([*PATHS, path, *trainer_flags(**changes)]))
    assert {name: getattr(settings, name) for name in found} == found


@pytest.mark.parametrize(
    "text, message",
    [
        ("hidden_size: 8\n", "got hidden_size: are the fields of the model not under `model:`"),
        ("model: {hiden_size: 8}\n", "model: 'hiden_size' is no field of MomaConfig. Did you mean 'hidden_size'"),
        (
            "model: {}\ntrainer: {max_step: 8}\n",
            "trainer: 'max_step' is no field of TrainingArguments that a recipe may set. Did you mean 'max_steps'",
        ),
        ("model: {}\ntrainer: {output_dir: x}\n", "trainer: 'output_dir'"),
        *[
            (f"model: {{}}\ntrainer: {{{name}: null}}\n", f"trainer: {name} has no value; give it one, or leave it")
            for name in ("max_grad_norm", "per_device_eval_batch_size", "max_steps", "learning_rate", "bf16")
        ],
        ("model: {}\ntrainer: false\n", "trainer: expected a mapping of fields, got False"),
        ("model: {}\ndata: 0\n", "data: expected a mapping of fields, got 0"),
        ("model: {}\ntrainer: {save_only_model: true}\n", "trainer: save_only_model = True: .*cannot be gone on from"),
        *[
            (
                f"model: {{}}\ntrainer: {{train_sampling_strategy: {name}}}\n",
                f"trainer: train_sampling_strategy = '{name}' is none of random, sequential: .*a run which goes on",
            )
            for name in ("group_by_length", "batch_rebalance")
        ],
        (
            "model: {}\ntrainer: {ignore_data_skip: true}\n",
            "trainer: ignore_data_skip = True: .*first documents again",
        ),
        (
            "model: {}\ntrainer: {num_train_epochs: 3}\n",
            "trainer: num_train_epochs = 3: a training is as long as `max_steps` says",
        ),
        (
            "model: {}\ntrainer: {data_seed: 3}\n",
            "trainer: data_seed = 3: the order of the documents follows from `seed`",
        ),
        *[
            (f"model: {{}}\ntrainer: {{{name}: true}}\n", f"trainer: {name} = True: {reason}")
            for name, reason in (
                ("auto_find_batch_size", ".*that fits"),
                ("dataloader_drop_last", "held-out documents"),
            )
        ],
        *[
            (f"model: {{}}\ntrainer: {{accelerator_config: {{{field}}}}}\n", f"accelerator_config: {message}")
            for field, message in (
                ("split_batches: true", "split_batches = True: .*fewer documents than are counted"),
                ("dispatch_batches: true", "dispatch_batches = True: each process reads its own"),
                ("even_batches: false", "even_batches = False: the processes would wait"),
                (
                    "gradient_accumulation_kwargs: {num_steps: 4}",
                    "gradient_accumulation_kwargs: num_steps = 4: documents are counted by",
                ),
            )
        ],
        (
            "model: {}\ntrainer: {accelerator_config: accelerate.json}\n",
            "accelerator_config = 'accelerate.json': give its fields here",
        ),
        ("model: [1]\n", "model: expected a mapping of fields, got .1."),
        (
            "data: {length: 8}\n",
            "data: 'length' is no field of this section. .*It takes .'packed', 'sequence_length'.",
        ),
        ("data: {sequence_length: 1}\n", "sequence_length = 1 must be at least 2: tokens of a sequence"),
        ("samples: {evry: 8}\n", "samples: 'evry' is no field of this section. Did you mean 'every'"),
        ("samples: {prompts: red apple}\n", "samples: prompts = 'red apple' must be a list: words to draw"),
        ("data: {packed: maybe}\n", "data: packed = 'maybe' must be true or false"),
        ("processor: 7\n", "processor: expected a mapping of fields, got 7"),
        ("sources: []\n", "sources: expected a mapping"),
        ("- 1\n", "got list"),
        ("model: {\n", "cannot be read as YAML"),
        ("model: {}\ndata: {packed: 2024-02-30}\n", "cannot be read as YAML: day is out of range .*line 2, column 16"),
        (f"model: {'[' * 500}\n", "cannot be read as YAML: maximum recursion depth"),
    ],
)
def test_what_nothing_knows_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    "text, key, lines",
    [
        ("sources:\n  notes: {data: a, text: b}\n  notes: {data: c, text: d}\n", "notes", (2, 3)),
        ("data: {packed: true}\nmodel: {}\ndata: {sequence_length: 8}\n", "data", (1, 3)),
        ("model:\n  hidden_size: 8\n  'hidden_size': 16\n", "hidden_size", (2, 3)),
        ('{"trainer": {"seed": 1, "seed": 1}}', "seed", (1, 1)),
    ],
    ids=["source", "section", "field", "json"],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, key, lines):
    with pytest.raises(InputError, match=f"recipe.yaml.*: '{key}' stands twice") as raised:
        read_recipe(write(tmp_path, text))
    assert "in line {} and in line {}".format(*lines) in str(raised.value) and "\n" not in str(raised.value)


def test_what_a_mapping_merges_may_stand_in_it_too(tmp_path):
    text = (
        "model: &small {hidden_size: 8, num_hidden_layers: 2}\nimage_tokenizer: &more {<<: *small, hidden_size: 16}\n"
    )
    read = read_recipe(write(tmp_path, text + "audio_tokenizer: {<<: *more, num_hidden_layers: 4}\n"))
    assert read.image_tokenizer == {"hidden_size": 16, "num_hidden_layers": 2}
    assert read.audio_tokenizer == {"hidden_size": 16, "num_hidden_layers": 4}


def test_settings_of_accelerate_that_change_no_document_are_taken(tmp_path):
    fields = "{split_batches: false, dispatch_batches: null, even_batches: true, non_blocking: true}"
    read = read_recipe(write(tmp_path, f"model: {{}}\ntrainer: {{accelerator_config: {fields}}}\n"))
    assert read.trainer["accelerator_config"]["non_blocking"]


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "inverse_sqrt", "constant_with_warmup", "cosine_with_min_lr"]
)
def test_schedule_may_be_named_alone(tmp_path, schedule):
    path = write(tmp_path, f"model: {{hidden_size: 8}}\ntrainer: {{lr_scheduler_type: {schedule}}}\n")
    settings = make_training_arguments(parse_arguments([*PATHS, path]))
    kwargs = {"min_lr_rate": 0.02} if schedule == "cosine_with_min_lr" else None
    assert (settings.lr_scheduler_type, settings.lr_scheduler_kwargs) == (schedule, kwargs)


def test_numbers_without_a_dot_are_numbers(tmp_path):
    schedule = "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 1e-2}"
    trainer = f"{{adam_epsilon: 1e-8, max_grad_norm: 1E0, {schedule}}}"
    text = f"model: {{hidden_size: 8, z_loss_coef: +1e-4}}\ntrainer: {trainer}\n"
    args = parse_arguments([*PATHS, write(tmp_path, text)])
    settings = make_training_arguments(args)
    assert (settings.adam_epsilon, settings.max_grad_norm, args.recipe.model["z_loss_coef"]) == (1e-8, 1.0, 1e-4)
    assert settings.lr_scheduler_kwargs == {"min_lr_rate": 0.01}
    # what is no setting of numbers stays as it is
    source = {"data": "d", "text": "text", "load": {"revision": "12e45678"}}
    text = f"sources: {{mine: {source}}}\nmodel: {{hidden_act: silu}}\n"
    read = read_recipe(write(tmp_path, text))
    assert read.sources[0].load["revision"] == "12e45678" and read.model["hidden_act"] == "silu"


@pytest.mark.parametrize(
    "trainer, message",
    [
        ("{optim: adamm}", "adamm"),
        ("{lr_scheduler_type: curved}", "curved"),
        ("{lr_scheduler_type: linear, lr_scheduler_kwargs: {min_lr_rate: 0.1}}", "min_lr_rate"),
        ("{lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: low}}", "unsupported operand"),
        ("{lr_scheduler_type: warmup_stable_decay}", "num_decay_steps"),
        ("{optim: Muon}", "did you mean 'muon'"),
        ("{fsdp: full_shard, fsdp_config: nowhere.json}", "nowhere.json"),
    ],
)
def test_what_the_trainer_refuses_is_told_in_one_line(tmp_path, trainer, message):
    args = parse_arguments([*PATHS, write(tmp_path, f"model: {{hidden_size: 8}}\ntrainer: {trainer}\n")])
    with pytest.raises(InputError, match=f"section `trainer`, .*: .*{message}") as raised:
        make_training_arguments(args)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name, value, least", [("per_device_eval_batch_size", 0, 1), ("dataloader_num_workers", -1, 0)]
)
def test_too_small_numbers_are_refused(tmp_path, name, value, least):
    path = write(tmp_path, f"model: {{hidden_size: 8}}\ntrainer: {{{name}: {value}}}\n")
    args = parse_arguments([*PATHS, path])
    with pytest.raises(InputError, match=f"{name} = {value} must be at least {least}"):
        make_training_arguments(args)


def test_a_refusal_does_not_print_what_opens_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    path = write(tmp_path, "model: {hidden_size: 8}\ntrainer: {hub_token: hf_secret, optim: adamm}\n")
    with pytest.raises(InputError, match="<HUB_TOKEN>") as raised:
        make_training_arguments(parse_arguments([*PATHS, path]))
    assert "hf_secret" not in str(raised.value)


def test_the_precision_of_a_launch_is_taken_and_never_overrules_a_recipe(tmp_path, monkeypatch):
    path = write(tmp_path, "model: {hidden_size: 8}\n")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for flags in ([], trainer_flags(bf16=True)):
        settings = make_training_arguments(parse_arguments([*PATHS, path, *flags]))
        assert settings.bf16 and settings.mixed_precision == "bf16"
    for launched, flag, wanted in (("bf16", False, "no"), ("fp16", True, "bf16"), ("fp8", False, "no")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        with pytest.raises(InputError, match=f"mixed_precision = '{launched}' .* says '{wanted}'"):
            make_training_arguments(parse_arguments([*PATHS, path, *trainer_flags(bf16=flag)]))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert make_training_arguments(parse_arguments([*PATHS, path, *trainer_flags(bf16=True)])).bf16


@pytest.mark.parametrize(
    "name, value",
    [
        *[(name, 0) for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")],
        *[(name, 0) for name in ("logging_steps", "eval_steps", "save_steps")],
        *[(name, -1) for name in ("warmup_steps", "learning_rate", "weight_decay")],
    ],
)
def test_sizes_that_no_training_has_are_refused(tmp_path, name, value):
    with pytest.raises(InputError, match=f"section `trainer`: {name} = {value} must be a"):
        parse_arguments([*PATHS, write(tmp_path, "model: {hidden_size: 8}\n"), *trainer_flags(**{name: value})])


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--stop-at", "9"), "--stop-at 9 is a step that the schedule does not reach: it has 4 "),
        (
            ("--stop-at", "4", "--set", "trainer.max_steps=3"),
            "--stop-at 4 is a step that the schedule does not reach: it has 3 ",
        ),
        (("--restart-data",), "--restart-data is of a saved model, .* no `--model` is given"),
        (("--stop-at", "4", "--restart-data", "--model", "m"), None),
    ],
)
def test_flags_that_would_change_nothing_are_refused(tmp_path, capsys, flags, message):
    command = [*PATHS, write(tmp_path, "model: {hidden_size: 8}\ntrainer: {max_steps: 4}\n"), *flags]
    if message is None:
        assert parse_arguments(command).stop_at == 4
        return
    with pytest.raises(SystemExit):
        parse_arguments(command)
    assert re.search(message, capsys.readouterr().err)


def test_what_is_no_yaml_is_told_in_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read as YAML: .*line 2") as raised:
        read_recipe(write(tmp_path, "model: {\n"))
    assert "\n" not in str(raised.value)


def test_missing_recipes_and_sections_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml"):
        read_recipe("nowhere.yaml")
    with pytest.raises(ValueError, match="has no section 'sources', which this command needs"):
        read_recipe(write(tmp_path, "model: {}\n"), needs=("sources",))
