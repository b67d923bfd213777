# SPDX-License-Identifier: Apache-2.0
"""Two runs in one folder, in every order of kill and `--resume`: the right model or one clear line."""

import itertools
import json
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from helpers.tiny import TRAINED, tiny_processor, trainer_flags, write_tokens, write_training
from modeling_moma.cli.main import main
from modeling_moma.cli.pretrain import parse_arguments
from modeling_moma.errors_moma import InputError
from modeling_moma.training import pretraining
from modeling_moma.training.fingerprints import check_output, difference


STEPS = 3
# where a start is killed; `None`: it ends
KILLS = ("start", "torn", "middle", "end", None)
# of a second start, which meets what each of them leaves
SECOND_KILLS = ("torn", "middle", None)
# a folder without a checkpoint is begun in alike with `--resume` and without
RESUMED = {**dict.fromkeys(KILLS, (False, True)), "start": (False,), "torn": (True,)}
# after these there is something to go on from
KEPT = ("middle", "end", None)


class Kill(TrainerCallback):
    """Leaves what a kill at some moment leaves."""

    def __init__(self, moment, output):
        self.moment, self.output = moment, output

    def on_step_begin(self, args, state, control, **kwargs):
        if (self.moment, state.global_step) in (("start", 0), ("middle", 2)):
            raise KeyboardInterrupt(signal.SIGKILL)

    def on_save(self, args, state, control, **kwargs):
        if self.moment == "torn":
            (self.output / f"checkpoint-{state.global_step}" / "trainer_state.json").unlink()
            raise KeyboardInterrupt(signal.SIGKILL)

    def on_train_end(self, args, state, control, **kwargs):
        if self.moment == "end":
            (self.output / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt(signal.SIGKILL)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    fields = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    processor = write_training(folder)
    write_tokens(folder / "other-tokens", processor, codings=2, train=12, validation=4)
    recipe = {"model": {**TRAINED, **fields}, "data": {"sequence_length": 64, "packed": True}}
    texts = {"sources": {"emoji": {"data": "nowhere", "image": "image", "text": "{label}"}}}
    for name, more in {
        "recipe": {},
        "wider": {"model": {**recipe["model"], "hidden_size": 32}},
        "longer": {"data": {"sequence_length": 96, "packed": True}},
        "unpacked": {"data": {"sequence_length": 64, "packed": False}},
        "texts": texts,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps({**recipe, **more}))
    return folder


def start(inputs, output, *more, kill=None, recipe="recipe", tokens="tokens"):
    """Status of `moma pretrain`, `None` where it is killed."""
    paths = ["--processor", inputs / "processor", "--tokens", inputs / tokens, "--output", output]
    sizes = {"max_steps": STEPS, "per_device_train_batch_size": 2, "eval_steps": 9, "save_steps": 1, "warmup_steps": 1}
    sizes |= {"logging_steps": 1, "bf16": False}
    given = ["pretrain", inputs / f"{recipe}.json", *paths, "--eval-examples", 2, *trainer_flags(**sizes)]
    build = pretraining.build_trainer

    def build_to_be_killed(*parts):
        trainer = build(*parts)
        trainer.add_callback(Kill(kill, output))
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "build_trainer", build_to_be_killed)
        status = main([*map(str, given), *map(str, more)])
    # what a run that was stopped returns
    return None if status == 130 else status


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(output):
    return load_file(output / "model.safetensors")


def is_same(mine, expected):
    return mine.keys() == expected.keys() and all(torch.equal(mine[name], expected[name]) for name in expected)


def assert_refused(capsys, inputs, output, *more, says=(), **options):
    before = contents(output)
    capsys.readouterr()
    assert start(inputs, output, *more, **options) == 2, "a run was not refused"
    (line,) = error_lines(capsys)
    assert line.startswith(f"error: `--output` '{output}' holds")
    assert "another `--output`" in line and "delete this folder" in line
    for text in says:
        assert text in line
    assert contents(output) == before


def error_lines(capsys):
    """What was told on stderr, but for the progress of loading the processor."""
    return [line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line]


RUNS = {"first": trainer_flags(seed=0), "second": trainer_flags(seed=1)}


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    """Each run's whole model, and the folders that the first one leaves."""
    folder = tmp_path_factory.mktemp("made")
    expected = {}
    for name, options in RUNS.items():
        assert start(inputs, folder / name, *options) == 0
        expected[name] = weights(folder / name)
    assert not is_same(*expected.values())
    for kill in KILLS:
        start(inputs, folder / str(kill), *RUNS["first"], kill=kill)
    return SimpleNamespace(folder=folder, expected=expected)


def is_refused(capsys, inputs, output, name, resume, kill, made):
    """Start a run; where it is refused nothing has changed, and where it ends the model is its own."""
    before = contents(output)
    capsys.readouterr()
    status = start(inputs, output, *RUNS[name], *["--resume"] * resume, kill=kill)
    if status == 2:
        assert contents(output) == before
        (line,) = error_lines(capsys)
        assert line.startswith("error: `--output`")
        return True
    if status == 0:
        assert is_same(weights(output), made.expected[name]), f"{name} ended with another model"
        assert "'train_loss': '0'" not in capsys.readouterr().out
    return False


@pytest.mark.parametrize("first_kill", KILLS)
def test_every_order_of_kills_and_resuming(inputs, made, tmp_path, capsys, first_kill):
    for number, (name, resume, kill) in enumerate(itertools.product(RUNS, RESUMED[first_kill], SECOND_KILLS)):
        is_other = first_kill in KEPT and (name != "first" or not resume)
        # a run that is refused comes to no moment of a kill
        if is_other and kill is not None:
            continue
        output = tmp_path / str(number)
        shutil.copytree(made.folder / str(first_kill), output)
        # what was there is neither begun anew in silence nor taken for another run's
        assert is_refused(capsys, inputs, output, name, resume, kill, made) == is_other, (name, resume, kill)
        # nothing has changed for a third run
        if is_other:
            continue
        owner = "first" if first_kill in KEPT else name if kill in KEPT else None
        for last in RUNS if owner else ("second",):
            copy = tmp_path / f"{number}-{last}"
            shutil.copytree(output, copy)
            assert is_refused(capsys, inputs, copy, last, True, None, made) == (owner not in (None, last))
            shutil.rmtree(copy)
        shutil.rmtree(output)


@pytest.fixture
def killed(made, tmp_path):
    shutil.copytree(made.folder / "middle", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    "more, options, says",
    [
        (trainer_flags(seed=1), {}, "seed = 0 there and 1 now"),
        (trainer_flags(per_device_train_batch_size=1), {}, "examples_a_step = 2 there and 1 now"),
        (trainer_flags(learning_rate=0.1), {}, "learning_rate = 0.0015 there and 0.1 now"),
        ((), {"recipe": "wider"}, "hidden_size = 16 there and 32 now"),
        ((), {"recipe": "longer"}, "sequence_length = 64 there and 96 now"),
        ((), {"recipe": "unpacked"}, "packed = True there and False now"),
        ((), {"recipe": "texts"}, "source emoji: "),
        ((), {"tokens": "other-tokens"}, "source emoji: "),
        (("--set", "model.gumbel_noise=0.5"), {}, "gumbel_noise = "),
    ],
    ids=lambda value: str(value)[:24],
)
def test_another_run_is_named_by_what_is_different(inputs, killed, capsys, more, options, says):
    for resume in ([], ["--resume"]):
        assert_refused(
            capsys, inputs, killed, *more, *resume, says=["holds another run", "checkpoint-2", says], **options
        )


@pytest.mark.parametrize(
    "more, processes, says",
    [
        (trainer_flags(per_device_train_batch_size=2), 2, "`gradient_accumulation_steps = 4` makes 16"),
        (
            trainer_flags(per_device_train_batch_size=4, gradient_accumulation_steps=8),
            1,
            "`gradient_accumulation_steps = 4` makes 16",
        ),
        (trainer_flags(per_device_train_batch_size=3), 2, "the first two have to make 8 together."),
        (trainer_flags(per_device_train_batch_size=2), 3, "nothing makes 16 of them; start a number"),
    ],
)
def test_a_step_of_other_examples_tells_how_it_is_made_the_same(inputs, tmp_path, monkeypatch, more, processes, says):
    given = ["--processor", inputs / "processor", "--tokens", inputs / "tokens", "--output", tmp_path / "out"]
    state = {"global_step": 1, "stateful_callbacks": {}}
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)

    def parts_of(*more):
        given_now = [*map(str, [inputs / "recipe.json", *given, *trainer_flags(bf16=False), *more])]
        return pretraining.read_parts(parse_arguments(given_now))

    facts = parts_of(*trainer_flags(per_device_train_batch_size=16)).facts
    state["stateful_callbacks"]["RunFingerprint"] = {"args": {"facts": facts}, "attributes": {}}
    (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
    monkeypatch.setattr(TrainingArguments, "world_size", processes)
    now = parts_of(*more)
    with pytest.raises(InputError, match=re.escape(says)) as error:
        check_output(str(tmp_path / "out"), now.facts, True, now.training_arguments)
    assert f"times processes (now {processes}) is the examples of a step" in str(error.value)
    assert "delete this folder" in str(error.value)
    # what else is different makes it another run, whose batch is of no interest
    with pytest.raises(InputError, match="seed = 0 there and 1 now. Give another"):
        other = parts_of(*more, *trainer_flags(seed=1)).facts
        check_output(str(tmp_path / "out"), other, True, now.training_arguments)


@pytest.mark.parametrize(
    "trainer, name",
    [
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"optim_args": "a=1"}, "optim_args"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last"),
        ({"adam_beta1": 0.8}, "adam_beta1"),
        ({"logging_steps": 7, "save_steps": 7, "eval_steps": 7, "save_total_limit": 1}, None),
        ({"dataloader_num_workers": 1, "dataloader_pin_memory": True, "run_name": "again"}, None),
        ({"activation_checkpointing": True, "ddp_timeout": 9, "disable_tqdm": True, "report_to": "none"}, None),
        ({"per_device_eval_batch_size": 3, "accelerator_config": {"non_blocking": True}}, None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_of_the_trainer_are_part_of_a_run_but_for_those_that_change_no_step(inputs, tmp_path, trainer, name):
    given = ["--processor", inputs / "processor", "--tokens", inputs / "tokens", "--output", tmp_path / "out"]
    args = parse_arguments([*map(str, [inputs / "recipe.json", *given, *trainer_flags(bf16=False)])])
    then = pretraining.read_parts(args).facts
    args.trainer = {**args.trainer, **trainer}
    now = pretraining.read_parts(args).facts
    if name is None:
        assert difference(then, now) is None
    else:
        assert f"the training is another, {name} = " in difference(then, now)


def test_weights_that_a_run_starts_from_are_part_of_it(inputs, made, tmp_path, capsys):
    for name in RUNS:
        shutil.copytree(made.folder / name, tmp_path / name)
        (tmp_path / name / "trainer_state.json").unlink()
    assert start(inputs, tmp_path / "out", "--model", tmp_path / "first", kill="middle") is None
    says = ["holds another run", "weights = "]
    assert_refused(capsys, inputs, tmp_path / "out", "--model", tmp_path / "second", "--resume", says=says)
    assert_refused(capsys, inputs, tmp_path / "out", "--resume", says=says)
    # wherever the weights lie
    (tmp_path / "first").rename(tmp_path / "moved")
    assert start(inputs, tmp_path / "out", "--model", tmp_path / "moved", "--resume") == 0


def test_steps_records_and_places_may_change(inputs, made, killed, tmp_path):
    shutil.copytree(inputs / "tokens", tmp_path / "tokens")
    killed.rename(tmp_path / "moved")
    more = [*trainer_flags(max_steps=4, logging_steps=2, eval_steps=2, save_steps=2), "--attn-implementation", "eager"]
    assert start(inputs, tmp_path / "moved", "--resume", *more, tokens=tmp_path / "tokens") == 0
    state = json.loads((tmp_path / "moved" / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (4, 4)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("kill", KEPT)
def test_a_run_of_unknown_origin_is_refused(inputs, made, tmp_path, capsys, kill, resume):
    """Its checkpoints do not say what they are of."""
    shutil.copytree(made.folder / str(kill), tmp_path / "out")
    for path in [*(tmp_path / "out").rglob("trainer_state.json"), tmp_path / "out" / "run.json"]:
        record = json.loads(path.read_text())
        record.pop("fingerprint", None)
        if "stateful_callbacks" in record:
            record["stateful_callbacks"].pop("RunFingerprint", None)
        path.write_text(json.dumps(record))
    says = ["holds another run", "checkpoint-", "does not say what it was made of"]
    assert_refused(capsys, inputs, tmp_path / "out", *RUNS["first"], *resume, says=says)


def test_another_packing_rule_is_another_run(inputs, killed, capsys, monkeypatch):
    assert_refused(capsys, inputs, killed, says=["holds this run already, 2 steps of it", "--resume"])
    monkeypatch.setattr("modeling_moma.training.fingerprints.PACKING_RULE", "another")
    assert_refused(capsys, inputs, killed, "--resume", says=["packing_rule = 'token-places' there"])


def test_a_finished_run_says_so_and_stays_as_it_is(inputs, made, tmp_path, capsys):
    shutil.copytree(made.folder / "first", tmp_path / "out")
    before = contents(tmp_path / "out")
    capsys.readouterr()
    assert start(inputs, tmp_path / "out", "--resume") == 0
    told = capsys.readouterr().out
    assert "has taken 3 of 3 steps and is finished" in told and "train_loss" not in told
    assert contents(tmp_path / "out") == before


def test_a_run_that_lacks_its_model_alone_writes_it_and_says_so(inputs, made, tmp_path, capsys):
    shutil.copytree(made.folder / "end", tmp_path / "out")
    capsys.readouterr()
    assert start(inputs, tmp_path / "out", "--resume") == 0
    told = capsys.readouterr().out
    assert "has taken all of its 3 steps; what is missing is written" in told and "train_loss" not in told
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert not any("train_loss" in entry for entry in history)
    assert is_same(weights(tmp_path / "out"), made.expected["first"])


def test_fewer_steps_than_were_taken_are_refused(inputs, killed, capsys):
    assert start(inputs, killed, "--resume", *trainer_flags(max_steps=1)) == 2
    assert "has taken 2 steps already, more than the 1 of `max_steps`" in capsys.readouterr().err


def test_a_model_of_something_else_is_not_written_over(inputs, tmp_path, capsys):
    tiny_processor().vq_model.save_pretrained(tmp_path / "out")
    before = contents(tmp_path / "out")
    for resume in ([], ["--resume"]):
        assert start(inputs, tmp_path / "out", *resume) == 2
        assert "has files in it already, such as 'config.json'" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"weight": 6.0}, "weight = 5.0 there and 6.0 now"),
        ({"alternatives": [{"text": "{tags}"}]}, "alternatives = [] there and [{'text': '{tags}'}] now"),
        ({"splits": {"train": "dev"}}, "splits: train = 'train[:98%]' there and 'dev' now"),
        ({"min_side": 9}, "min_side = None there and 9 now"),
    ],
)
def test_the_field_of_a_source_that_differs_is_named_however_many_it_has(now, told):
    source = {"alternatives": [], "codings": 1, "image": "image", "text": "a photo of {caption}, taken by {author}"}
    source |= {"weight": 5.0, "splits": {"train": "train[:98%]"}}
    then, now = ({"data": {"source photos": {**source, **fields}}} for fields in ({}, now))
    assert difference(then, now) == f"the data is another, source photos: {told}"
