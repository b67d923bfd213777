# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import signal
from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import get_token
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_flash_attn_2_available

from helpers.tiny import TRAINED, tiny_model, tiny_processor, trainer_flags, write_tokens, write_training
from modeling_moma import MomaForCausalLM
from modeling_moma.cli import add_layers, tokenize, upcycle
from modeling_moma.cli.pretrain import main, parse_arguments
from modeling_moma.data.documents import TokenFolder, check_layout, evenly_spaced
from modeling_moma.data.encoding import processor_fingerprint
from modeling_moma.data.stream import DocumentExamples
from modeling_moma.errors_moma import InputError
from modeling_moma.routing_moma import MomaRouter
from modeling_moma.training import pretraining, stage_trainer
from modeling_moma.training.checkpoints import data_order, examples_a_step, feeding_fields, first_step, set_attention
from modeling_moma.training.fingerprints import check_output
from modeling_moma.training.pretraining import build_trainer
from modeling_moma.training.trainer_settings import make_training_arguments
from tokenization import MomaProcessor


PAD = tiny_processor().tokenizer.pad_token_id


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    write_training(folder, codings=3)
    (folder / "seed.json").write_text(json.dumps({"model": {**TRAINED, "num_experts": {"text": 1, "image": 1}}}))
    return folder


def arguments(inputs, output, *more, start=None):
    names = ("processor", "tokens")
    paths = [text for name in names for text in (f"--{name}", str(inputs / name))]
    sizes = {"max_steps": 8, "per_device_train_batch_size": 4, "eval_steps": 8, "save_steps": 4, "warmup_steps": 2}
    start = start or (inputs / "recipe.json",)
    return [*paths, *map(str, start), "--output", str(output), *trainer_flags(**sizes, logging_steps=1), *more]


def last_log(output, key):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [log[key] for log in history if key in log][-1]


class KillAfter(TrainerCallback):
    """Ends the process's training the hard way, between a step and its log."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt(signal.SIGKILL)


def test_killed_and_resumed_reaches_the_same_loss_as_uninterrupted(inputs, tmp_path):
    main(arguments(inputs, tmp_path / "whole"))

    trainer = build_trainer(parse_arguments(arguments(inputs, tmp_path / "killed")))
    trainer.add_callback(KillAfter())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    main(arguments(inputs, tmp_path / "killed", "--resume"))

    for key in ("eval_loss", "eval_text_loss", "eval_image_loss"):
        expected = last_log(tmp_path / "whole", key)
        assert last_log(tmp_path / "killed", key) == pytest.approx(expected, abs=1e-6)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    for name, tensor in whole.items():
        torch.testing.assert_close(killed[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_saved_tokenizer_knows_where_the_model_ends(inputs, stages):
    tokenizer = AutoTokenizer.from_pretrained(stages.whole.output)
    assert tokenizer.model_max_length == 64 and tokenizer.padding_side == tiny_processor().tokenizer.padding_side


@pytest.mark.parametrize("run", ["whole", "stopped"])
def test_model_can_be_used_from_its_folder_alone(inputs, stages, run):
    folder = getattr(stages, run).output
    processor, given = (MomaProcessor.from_pretrained(path) for path in (folder, inputs / "processor"))
    assert processor_fingerprint(processor) == processor_fingerprint(given)
    check_layout(MomaForCausalLM.from_pretrained(folder).config, processor.token_layout())


def test_loss_falls(inputs, tmp_path):
    main(arguments(inputs, tmp_path, *trainer_flags(learning_rate=0.01)))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [log["eval_loss"] for log in history if "eval_loss" in log]
    assert losses[-1] < losses[0]


def test_a_large_vocabulary_costs_no_logits_and_changes_nothing(inputs, tmp_path, monkeypatch):
    main(arguments(inputs, tmp_path / "whole", *trainer_flags(bf16=False)))
    monkeypatch.setattr(stage_trainer, "LARGEST_LOGITS", 0)
    skipped = []
    forward = MomaForCausalLM.forward

    # the trainer reads the signature
    @wraps(forward)
    def record(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        skipped.append(output.logits is None)
        return output

    monkeypatch.setattr(MomaForCausalLM, "forward", record)
    main(arguments(inputs, tmp_path / "spared", *trainer_flags(bf16=False)))
    assert len(skipped) >= 8 and all(skipped)
    for key in ("loss", "eval_loss", "eval_text_loss", "eval_image_loss"):
        assert last_log(tmp_path / "spared", key) == pytest.approx(last_log(tmp_path / "whole", key), rel=1e-4)
    whole, spared = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "spared"))
    for name, tensor in whole.items():
        torch.testing.assert_close(spared[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


class OptimizerAtStart(TrainerCallback):
    """Keeps what the optimizer knows before the first step."""

    num_states = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.num_states = len(optimizer.state)


def run(inputs, output, *more, start=None, callbacks=()):
    """Run the script; tells the batches that the model was trained on, and the trainer at the end."""
    batches, kept, at_start = [], {}, OptimizerAtStart()

    def record(model, args, kwargs):
        if model.training:
            batches.append(kwargs["input_ids"].tolist())

    def build(*parts):
        trainer = build_trainer(*parts)
        trainer.model.register_forward_pre_hook(record, with_kwargs=True)
        for callback in (at_start, *callbacks):
            trainer.add_callback(callback)
        kept["trainer"] = trainer
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "build_trainer", build)
        try:
            main(arguments(inputs, output, *more, start=start))
        except KeyboardInterrupt:
            pass
    trainer = kept["trainer"]
    return SimpleNamespace(
        batches=batches,
        output=output,
        history=trainer.state.log_history,
        # none where nothing was left to train
        last_rate=trainer.lr_scheduler.get_last_lr()[0] if trainer.lr_scheduler else None,
        num_states=at_start.num_states,
        trainer=trainer,
    )


class KillAtTheEnd(TrainerCallback):
    """Ends the process's training after its last checkpoint, with half of the model written."""

    def __init__(self, output):
        self.output = output

    def on_train_end(self, args, state, control, **kwargs):
        (self.output / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt(signal.SIGKILL)


def rates(run):
    return {log["step"]: log["learning_rate"] for log in run.history if "learning_rate" in log}


@pytest.fixture(scope="module")
def stages(inputs, tmp_path_factory):
    """A seed's whole training, the same stopped at step 3, and what goes on from there with experts."""
    folder = tmp_path_factory.mktemp("stages")
    seed = (inputs / "seed.json",)
    whole = run(inputs, folder / "whole", start=seed)
    stopped = run(inputs, folder / "stopped", "--stop-at", "3", start=seed)
    upcycle.main(
        ["--model", str(folder / "stopped" / "checkpoint-3"), "--to", "2t2i", "--output", str(folder / "grown")]
    )
    start = ("--model", folder / "grown")
    continued = run(inputs, folder / "continued", *trainer_flags(eval_steps=2), start=start)
    return SimpleNamespace(whole=whole, stopped=stopped, continued=continued, start=start, folder=folder)


def test_stopped_training_is_the_whole_one_up_to_there(stages):
    whole, stopped = stages.whole, stages.stopped
    assert len(whole.batches) == 8 and stopped.batches == whole.batches[:3]
    assert rates(stopped) == {step: rate for step, rate in rates(whole).items() if step <= 3}
    state = json.loads((stopped.output / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (3, 8)
    assert [path.name for path in stopped.output.glob("checkpoint-*")] == ["checkpoint-3"]
    final, checkpoint = (load_file(f / "model.safetensors") for f in (stopped.output, stopped.output / "checkpoint-3"))
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in final.items())


def test_stopped_training_can_be_resumed_to_its_end(stages, inputs, tmp_path):
    shutil.copytree(stages.stopped.output, tmp_path / "stopped")
    resumed = run(inputs, tmp_path / "stopped", "--resume", start=(inputs / "seed.json",))
    assert resumed.batches == stages.whole.batches[3:]
    assert rates(resumed) == rates(stages.whole)
    whole, mine = (load_file(f / "model.safetensors") for f in (stages.whole.output, resumed.output))
    for name, tensor in whole.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_stopped_training_that_was_killed_at_its_end_takes_no_further_step(stages, inputs, tmp_path):
    shutil.copytree(stages.stopped.output / "checkpoint-3", tmp_path / "checkpoint-3")
    main(arguments(inputs, tmp_path, "--stop-at", "3", "--resume", start=(inputs / "seed.json",)))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3
    whole, mine = (load_file(f / "model.safetensors") for f in (stages.stopped.output, tmp_path))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in mine.items())
    assert not (tmp_path / "optimizer.pt").exists()
    assert (tmp_path / "processor_config.json").exists()


def test_stopped_training_that_was_killed_at_its_end_leaves_its_best_model(inputs, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    for name, trainer in {"best": best, "other": {**best, "metric_for_best_model": "eval_text_loss"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"model": TRAINED, "trainer": trainer}))
    more = [*trainer_flags(eval_steps=1, save_steps=1, learning_rate=0.01, save_total_limit=4), "--stop-at", "4"]
    output = tmp_path / "out"
    main(arguments(inputs, output, *more, start=[tmp_path / "best.json"]))
    best_step = json.loads((output / "trainer_state.json").read_text())["best_global_step"]
    expected = {name: load_file(output / name / "model.safetensors") for name in (".", "checkpoint-4")}
    assert best_step < 4 and not torch.equal(*(state["lm_head.weight"] for state in expected.values()))
    # a model that another figure would choose was not evaluated by it: the last one is left
    for recipe, name in (("best", "."), ("other", "checkpoint-4")):
        for path in output.iterdir():
            if path.is_file():
                path.unlink()
        main(arguments(inputs, output, *more, "--resume", start=[tmp_path / f"{recipe}.json"]))
        left = load_file(output / "model.safetensors")
        assert all(torch.equal(left[key], value) for key, value in expected[name].items())
        assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 4


def test_checkpoint_that_cannot_be_copied_leaves_no_half_of_itself(stages, inputs, tmp_path):
    shutil.copytree(stages.stopped.output / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    (tmp_path / "out" / "checkpoint-3" / "zz").symlink_to("nowhere")
    with pytest.raises(shutil.Error):
        main(arguments(inputs, tmp_path / "out", "--stop-at", "3", "--resume", start=(inputs / "seed.json",)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-3", "run.json"}


@pytest.mark.parametrize("more", [(), ("--stop-at", "3")], ids=["whole", "stopped"])
def test_training_killed_while_its_model_was_saved_counts_as_unfinished_and_is_repaired(
    stages, inputs, tmp_path, more
):
    start = (inputs / "seed.json",)
    output = tmp_path / "out"
    run(inputs, output, *more, start=start, callbacks=[KillAtTheEnd(output)])
    assert (output / "model.safetensors").exists() and not (output / "trainer_state.json").exists()
    repaired = run(inputs, output, *more, "--resume", start=start)
    assert repaired.batches == []
    state = json.loads((output / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (3 if more else 8, 8)
    expected = load_file((stages.stopped if more else stages.whole).output / "model.safetensors")
    mine = load_file(output / "model.safetensors")
    assert mine.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in mine.items())


def test_state_is_written_after_the_model(stages):
    for stage in (stages.whole, stages.stopped, stages.continued):
        model, state = (stage.output / name for name in ("model.safetensors", "trainer_state.json"))
        assert model.stat().st_mtime_ns <= state.stat().st_mtime_ns


def test_upcycled_model_goes_on_with_the_data_that_its_seed_has_not_seen(stages):
    assert stages.stopped.batches + stages.continued.batches == stages.whole.batches
    assert stages.continued.trainer.state.global_step == 8
    assert json.loads((stages.continued.output / "run.json").read_text())["first_step"] == 3


def test_deeper_model_goes_on_with_the_data_that_the_stage_before_has_not_seen(stages, inputs):
    grown, deeper = stages.folder / "grown", stages.folder / "deeper"
    # of an upcycled model, whose own receipt tells of the data
    add_layers.main(["--model", str(grown), "--after", "0", "1", "--output", str(deeper)])
    continued = run(inputs, stages.folder / "deeper-continued", start=("--model", deeper))
    assert continued.trainer.model.config.num_hidden_layers == 4
    assert continued.batches == stages.continued.batches
    assert continued.num_states == 0


def test_a_training_from_a_model_is_not_told_how_its_captions_begin(inputs, tmp_path):
    model = tiny_model(tiny_processor(), **TRAINED)
    model.generation_config.caption_suppress_tokens = [2, 30]
    model.save_pretrained(tmp_path / "released")
    trainer = build_trainer(
        parse_arguments(arguments(inputs, tmp_path / "out", start=("--model", tmp_path / "released")))
    )
    assert getattr(trainer.model.generation_config, "caption_suppress_tokens", None) is None
    trainer.save_model(str(tmp_path / "saved"))
    assert "caption_suppress_tokens" not in (tmp_path / "saved" / "generation_config.json").read_text()


def test_upcycled_model_has_a_fresh_optimizer_and_a_whole_schedule(stages):
    assert stages.continued.num_states == 0
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.5e-3)
    schedule = get_scheduler("cosine_with_min_lr", optimizer, 2, 5, scheduler_specific_kwargs={"min_lr_rate": 0.02})
    for step in range(4, 9):
        assert rates(stages.continued)[step] == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    # warm-up from nothing, and the minimum after the last step
    assert rates(stages.continued)[4] == 0
    assert stages.continued.last_rate == pytest.approx(0.02 * 1.5e-3)


def best_of(run):
    """The best figure of a run's own evaluations, its step, and the state's."""
    own = [(log["eval_loss"], log["step"]) for log in run.history if "eval_loss" in log and log["step"] > 4]
    state = json.loads((run.output / "trainer_state.json").read_text())
    return min(own), (state["best_metric"], state["best_global_step"])


@pytest.mark.parametrize("more", [(), trainer_flags(save_total_limit=1)], ids=["all kept", "one kept"])
def test_a_stage_chooses_the_best_of_its_own_models(inputs, tmp_path, more):
    recipe = json.loads((inputs / "seed.json").read_text())
    # a figure of the stage before that no loss comes near
    by_load = {"load_best_model_at_end": True, "metric_for_best_model": "eval_text_loss", "greater_is_better": True}
    (tmp_path / "seed.json").write_text(json.dumps({**recipe, "trainer": by_load}))
    often = trainer_flags(eval_steps=2, save_steps=2)
    run(inputs, tmp_path / "seed", "--stop-at", "4", *often, start=(tmp_path / "seed.json",))
    upcycle.main(["--model", str(tmp_path / "seed"), "--to", "2t2i", "--output", str(tmp_path / "grown")])
    (tmp_path / "next.json").write_text(json.dumps({"trainer": {"load_best_model_at_end": True}}))
    start = (tmp_path / "next.json", "--model", tmp_path / "grown")
    second = run(inputs, tmp_path / "second", *often, *more, start=start)
    own, state = best_of(second)
    assert state == own and own[1] in (6, 8)
    kept = {path.name for path in second.output.glob("checkpoint-*")}
    assert f"checkpoint-{own[1]}" in kept and kept <= {"checkpoint-6", "checkpoint-8"}
    best, mine = (load_file(f / "model.safetensors") for f in (second.output / f"checkpoint-{own[1]}", second.output))
    assert all(torch.equal(tensor, best[name]) for name, tensor in mine.items())


def test_a_resumed_run_that_chooses_by_another_figure_forgets_the_best(inputs, tmp_path):
    recipe = json.loads((inputs / "seed.json").read_text())
    often = trainer_flags(eval_steps=2, save_steps=2)

    def start(name, **fields):
        trainer = {"load_best_model_at_end": True, **fields}
        (tmp_path / name).write_text(json.dumps({**recipe, "trainer": trainer}))
        return (tmp_path / name,)

    by_load = start("load.json", metric_for_best_model="eval_text_loss", greater_is_better=False)
    run(inputs, tmp_path / "out", "--stop-at", "4", *often, start=by_load)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_global_step"] in (2, 4)
    greatest = start("greatest.json", metric_for_best_model="eval_loss", greater_is_better=True)
    resumed = run(inputs, tmp_path / "out", "--resume", *often, start=greatest)
    own = [(log["eval_loss"], log["step"]) for log in resumed.history if "eval_loss" in log and log["step"] > 4]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_global_step"]) == max(own)


def test_a_finished_run_without_a_checkpoint_is_not_begun_again(stages, inputs, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(stages.whole.output, output, ignore=shutil.ignore_patterns("checkpoint-*"))
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    with pytest.raises(InputError, match="finished at step 8 and has no checkpoint.*step 10.*--restart-data"):
        main(arguments(inputs, output, "--resume", *trainer_flags(max_steps=10), start=(inputs / "seed.json",)))
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before


def test_fields_of_a_recipes_model_that_are_not_read_are_named(stages, inputs, tmp_path, caplog):
    model = {**TRAINED, "num_experts": {"text": 1, "image": 1}, "z_loss_coef": 0.1}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"model": {**model, "modality_loss_weights": {"text": 50.0}}}))
    given = arguments(inputs, tmp_path / "out", start=(recipe, "--model", stages.whole.output, "--restart-data"))
    trainer = build_trainer(parse_arguments(given))
    (said,) = [text for text in caplog.messages if text.startswith("RECIPE, model")]
    assert "z_loss_coef = 0.1 is not read beside `--model`" in said
    assert "own 1e-05 stays, and so do modality_loss_weights. " in said
    assert trainer.model.config.z_loss_coef == 1e-5
    caplog.clear()
    same = arguments(inputs, tmp_path / "out", start=(inputs / "seed.json", "--model", stages.whole.output))
    build_trainer(parse_arguments([*same, "--restart-data"]))
    assert not [text for text in caplog.messages if text.startswith("RECIPE, model")]


def test_a_date_in_a_recipe_is_recorded_and_no_token_of_the_hub(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    recipe = json.loads((inputs / "seed.json").read_text())
    settings = ', "trainer": {"run_name": 2026-11-30, "hub_token": "hf_secret"}}'
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe)[:-1] + settings)
    main(arguments(inputs, tmp_path / "out", *trainer_flags(max_steps=1), start=(tmp_path / "recipe.yaml",)))
    trainer = json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]["trainer"]
    assert (trainer["run_name"], trainer["hub_token"]) == ("2026-11-30", "<HUB_TOKEN>")
    assert get_token() == "hf_secret"
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes(), path


def test_upcycled_model_is_evaluated_as_its_own_arguments_say(stages):
    steps = [log["step"] for log in stages.continued.history if "eval_loss" in log]
    # the seed's at 0, where it begins, and every second step; not every eighth as its seed
    assert steps == [0, 3, 4, 6, 8]


def test_killed_and_resumed_continuation_equals_the_uninterrupted(stages, inputs, tmp_path):
    more = trainer_flags(eval_steps=2)
    killed = run(inputs, tmp_path / "killed", *more, start=stages.start, callbacks=[KillAfter()])
    assert [path.name for path in killed.output.glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = run(inputs, killed.output, *more, "--resume", start=stages.start)
    assert resumed.num_states > 0
    assert killed.batches + resumed.batches[2:] == stages.continued.batches
    assert rates(resumed) == rates(stages.continued)
    whole, mine = (load_file(f / "model.safetensors") for f in (stages.continued.output, resumed.output))
    for name, tensor in whole.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_data_position_counts_accumulated_batches(inputs, tmp_path):
    seed = (inputs / "seed.json",)
    sizes = trainer_flags(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_steps=9)
    whole = run(inputs, tmp_path / "whole", *sizes, start=seed)
    stopped = run(inputs, tmp_path / "stopped", *sizes, "--stop-at", "2", start=seed)
    upcycle.main(["--model", str(stopped.output), "--to", "2t1i", "--output", str(tmp_path / "grown")])
    continued = run(inputs, tmp_path / "continued", *sizes, start=("--model", tmp_path / "grown"))
    assert len(whole.batches) == 6
    assert stopped.batches + continued.batches == whole.batches


def test_checkpoint_of_a_seed_starts_without_its_optimizer_too(stages, inputs, tmp_path):
    checkpoint = stages.stopped.output / "checkpoint-3"
    assert (checkpoint / "optimizer.pt").is_file()
    continued = run(inputs, tmp_path / "continued", start=("--model", checkpoint))
    assert continued.num_states == 0
    assert continued.batches == stages.whole.batches[3:]
    assert {step: rate for step, rate in rates(continued).items() if step > 3} == pytest.approx(
        {step: rate for step, rate in rates(stages.continued).items() if step > 3}
    )


def rows(batches):
    """Examples without the padding, which depends on the batch."""
    return sorted([token for token in row if token != PAD] for batch in batches for row in batch)


def test_examples_of_a_step_may_be_split_otherwise(stages, inputs, tmp_path):
    sizes = trainer_flags(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    continued = run(inputs, tmp_path / "continued", *sizes, start=stages.start)
    assert len(continued.batches) == 10
    assert rows(continued.batches) == rows(stages.continued.batches)


def test_longer_second_stage_goes_on_in_the_same_data(stages, inputs, tmp_path):
    longer = run(inputs, tmp_path / "longer", *trainer_flags(max_steps=10), start=stages.start)
    assert len(longer.batches) == 7 and longer.batches[:5] == stages.continued.batches


def test_torn_checkpoint_does_not_outlive_whole_ones(inputs, tmp_path):
    small = trainer_flags(save_steps=2, save_total_limit=1)
    main(arguments(inputs, tmp_path, *small, "--stop-at", "2"))
    torn = tmp_path / "checkpoint-7"
    torn.mkdir()
    (torn / "model.safetensors").touch()
    main(arguments(inputs, tmp_path, *small, "--stop-at", "4", "--resume"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_second_stage_on_other_data_is_refused(stages, inputs, tmp_path):
    recipe = json.loads((inputs / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "data": {"sequence_length": 48, "packed": True}}))
    write_tokens(tmp_path / "tokens", tiny_processor(), codings=2, train=9, validation=4)
    # the last flag counts
    for name, more in (("packed", [tmp_path / "recipe.json"]), ("source", ["--tokens", tmp_path / "tokens"])):
        for model in (stages.start[1], stages.stopped.output / "checkpoint-3"):
            start = [*map(str, more), "--model", str(model)]
            with pytest.raises(InputError, match=f"has taken 3 steps, .*the data is another, {name}.*--restart-data"):
                main(arguments(inputs, tmp_path / "out", start=start))
    assert not (tmp_path / "out").exists()


def test_documents_to_be_packed_are_not_read_as_rows(tmp_path):
    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "processor")
    (tmp_path / "lines.txt").write_text("red apple castle " * 90 + "\n" + "green\n" * 9)
    fields = {"sources": {"lines": {"data": str(tmp_path / "lines.txt"), "text": "text", "held_out": 0}}}
    recipe = {**fields, "model": TRAINED, "data": {"sequence_length": 48, "packed": True}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    folders = ["--processor", str(tmp_path / "processor"), "--output", str(tmp_path / "tokens")]
    tokenize.main([str(tmp_path / "recipe.json"), *folders, "--processes", "1"])
    recipe["data"]["packed"] = False
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(InputError, match="packed = false, but .* to be packed, and 1 documents of 'lines' are longer"):
        main(arguments(tmp_path, tmp_path / "out"))
    tokens = TokenFolder(tmp_path / "tokens", processor)
    documents = [tokens.documents(source) for source in tokens.sources()]
    lengths = [
        [len(stream[index]["input_ids"]) for index in range(10)]
        for stream in (DocumentExamples(documents, [1], 10, cuts=cuts) for cuts in (False, True))
    ]
    assert max(lengths[0]) > 48 and lengths[1] == [min(length, 48) for length in lengths[0]]


def test_order_of_the_data_is_known_of_outputs_checkpoints_and_grown_models(stages, tmp_path, monkeypatch):
    checkpoint = stages.stopped.output / "checkpoint-3"
    for folder in (stages.stopped.output, checkpoint, stages.folder / "grown", stages.continued.output):
        order = data_order(folder)
        assert (order["seed"], order["examples_a_step"], order["data"]["packed"]) == (0, 4, False), folder
    monkeypatch.chdir(checkpoint)
    assert data_order(".") == order
    assert data_order(tmp_path) is None


@pytest.mark.parametrize("name", ["trainer_state.json", "run.json", "upcycling.json"])
@pytest.mark.parametrize("text, said", [('{"max_steps": ', "it cannot be read as JSON"), ("[]", "it holds a list")])
def test_damaged_record_of_an_earlier_stage_is_named(tmp_path, name, text, said):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 4, "max_steps": 8}')
    (tmp_path / name).write_text(text)
    settings = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=8, use_cpu=True)
    with pytest.raises(InputError, match=f"{name}.: {said}.*; was its folder copied in part"):
        first_step(str(tmp_path), settings)
    assert first_step(str(tmp_path), settings, restart_data=True) == 0
    (tmp_path / "config.json").write_text("{}")
    if name == "run.json":
        (tmp_path / "trainer_state.json").unlink()
        with pytest.raises(InputError, match=f"run.json.: {said}"):
            check_output(str(tmp_path), {}, resume=False)


def test_records_of_something_else_are_no_earlier_stage(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"steps": 4}')
    settings = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=8, use_cpu=True)
    with pytest.raises(InputError, match="trainer_state.json. is none that a training .*--restart-data"):
        first_step(str(tmp_path), settings)
    (tmp_path / "run.json").write_text('{"fingerprint": {"seed": {"seed": 0}}}')
    assert data_order(tmp_path) is None


def test_examples_of_all_devices_count():
    args = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=2, world_size=3)
    assert examples_a_step(args) == 24


def test_order_that_cannot_be_checked_is_warned_of(stages, inputs, tmp_path, caplog):
    shutil.copytree(stages.stopped.output / "checkpoint-3", tmp_path / "model")
    start = ("--model", tmp_path / "model")
    trainer = build_trainer(parse_arguments(arguments(inputs, tmp_path / "out", start=start)))
    assert trainer.first_step == 3
    (warning,) = [
        record.getMessage() for record in caplog.records if record.name == "modeling_moma.training.checkpoints"
    ]
    assert "run.json" in warning and "cannot be checked" in warning and "--restart-data" in warning
    # what trainer_state.json knows is checked all the same
    with pytest.raises(ValueError, match="per_device_train_batch_size.* = 2 is not the 4 .*--restart-data"):
        build_trainer(
            parse_arguments(
                arguments(inputs, tmp_path / "out", *trainer_flags(per_device_train_batch_size=2), start=start)
            )
        )
    caplog.clear()
    for start in (stages.start, ("--model", stages.stopped.output / "checkpoint-3")):
        build_trainer(parse_arguments(arguments(inputs, tmp_path / "out", start=start)))
    assert not [record for record in caplog.records if record.name == "modeling_moma.training.checkpoints"]


def test_model_of_a_finished_training_is_refused_as_such_whatever_the_steps(stages, inputs, tmp_path):
    upcycle.main(["--model", str(stages.whole.output), "--to", "2t2i", "--output", str(tmp_path / "grown")])
    for model in (stages.whole.output, stages.whole.output / "checkpoint-8", tmp_path / "grown"):
        for more in ((), trainer_flags(max_steps=20, seed=1)):
            args = parse_arguments(arguments(inputs, tmp_path / "out", *more, start=("--model", model)))
            with pytest.raises(ValueError, match="is finished.* all of its 8 steps.*--restart-data"):
                build_trainer(args)


def test_model_without_a_trainer_state_starts_at_the_first_batch(stages, inputs, tmp_path):
    model = MomaForCausalLM.from_pretrained(stages.start[1]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    fresh = run(inputs, tmp_path / "out", "--stop-at", "2", start=("--model", tmp_path / "model"))
    assert fresh.batches == stages.whole.batches[:2]
    assert fresh.num_states == 0 and rates(fresh) == {1: 0.0, 2: 0.00075}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["first_step"] == 0
    # however it was saved, it learns in fp32
    assert {parameter.dtype for parameter in fresh.trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "more, named",
    [
        (trainer_flags(per_device_train_batch_size=2), "`per_device_train_batch_size` .* = 2 is not the 4 "),
        (trainer_flags(gradient_accumulation_steps=2), "`gradient_accumulation_steps` .* = 8 is not the 4 "),
        (trainer_flags(seed=1), "`seed` = 1 is not the 0 "),
        (["--stop-at", "3"], "3 steps"),
    ],
)
def test_continuation_that_would_repeat_data_or_train_nothing_is_refused(stages, inputs, tmp_path, more, named):
    for model in (stages.start[1], stages.stopped.output / "checkpoint-3"):
        with pytest.raises(ValueError, match=f"{named}.*--restart-data"):
            main(arguments(inputs, tmp_path / "out", *more, start=("--model", model)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number, indices", [(1, [0]), (3, [0, 3, 6]), (7, [0, 1, 2, 4, 5, 7, 8]), (99, range(10))])
def test_as_many_examples_are_evaluated_as_asked_for_spread_over_all(number, indices):
    assert evenly_spaced(list(range(10)), number) == list(indices)


def test_all_examples_are_evaluated_by_default(stages, inputs, tmp_path):
    assert len(stages.whole.trainer.eval_dataset) == 8
    for number in (3, 5, 8, 9):
        args = parse_arguments(arguments(inputs, tmp_path, "--eval-examples", str(number)))
        assert len(build_trainer(args).eval_dataset) == min(number, 8)


@pytest.mark.parametrize("number", ["0", "-1", "few"])
def test_number_of_examples_to_evaluate_is_positive(inputs, tmp_path, number, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments(inputs, tmp_path, "--eval-examples", number))
    assert "--eval-examples" in capsys.readouterr().err


def noise_of(inputs, output, *more, start):
    """The config's noise and the routers'."""
    trainer = build_trainer(parse_arguments(arguments(inputs, output, *more, start=start)))
    scales = {module.config.gumbel_noise for module in trainer.model.modules() if isinstance(module, MomaRouter)}
    return trainer.model.config.gumbel_noise, scales


@pytest.mark.parametrize(
    "more, expected", [((), 1.0), (("--set", "model.gumbel_noise=0"), 0.0), (("--set", "model.gumbel_noise=0.5"), 0.5)]
)
def test_noise_of_the_routers_is_told_and_can_be_set(stages, inputs, tmp_path, capsys, more, expected):
    scale, scales = noise_of(inputs, tmp_path, *more, start=stages.start)
    assert scale == expected and scales == {expected}
    noise = [line for line in capsys.readouterr().out.splitlines() if "noise" in line]
    assert noise == ([f"Gumbel noise of scale {expected} on the expert routers, which stays"] if expected else [])


def test_noise_that_fades_is_told_with_its_clock(stages, inputs, tmp_path, capsys):
    source, grown = str(stages.stopped.output), tmp_path / "grown"
    upcycle.main(["--model", source, "--to", "2t2i", "--set", "model.gumbel_noise_steps=30", "--output", str(grown)])
    output = tmp_path / "out"
    main(
        arguments(
            inputs,
            output,
            "--stop-at",
            "5",
            *trainer_flags(per_device_train_batch_size=2, gradient_accumulation_steps=2),
            start=("--model", grown),
        )
    )
    assert "of scale 1.0 on the expert routers, fading over 30 training forwards, 0 past" in capsys.readouterr().out
    # two steps of two batches
    noise_of(inputs, tmp_path / "more", start=("--model", output))
    assert "fading over 30 training forwards, 4 past" in capsys.readouterr().out


def test_noise_that_was_turned_off_stays_off_in_what_is_saved(stages, inputs, tmp_path):
    quiet, loud = (
        run(inputs, tmp_path / scale, "--set", f"model.gumbel_noise={scale}", "--stop-at", "6", start=stages.start)
        for scale in ("0", "3")
    )
    assert MomaForCausalLM.from_pretrained(quiet.output).config.gumbel_noise == 0
    first, second = (load_file(stage.output / "model.safetensors") for stage in (quiet, loud))
    name = "model.layers.0.mlp.groups.text.router.weight"
    assert not torch.equal(first[name], second[name])


def test_noise_can_be_set_from_nothing_too_and_is_not_negative(inputs, stages, tmp_path, capsys):
    start = (inputs / "recipe.json",)
    assert noise_of(inputs, tmp_path, start=start)[1] == {0.0}
    assert "noise" not in capsys.readouterr().out
    assert noise_of(inputs, tmp_path, "--set", "model.gumbel_noise=0.5", start=start)[1] == {0.5}
    for begin in (start, stages.start):
        with pytest.raises(Exception, match="gumbel_noise"):
            noise_of(inputs, tmp_path, "--set", "model.gumbel_noise=-1", start=begin)


def test_restarted_data_begin_at_the_first_batch(stages, inputs, tmp_path):
    more = ("--restart-data", *trainer_flags(max_steps=4))
    fresh = run(inputs, tmp_path / "out", *more, start=stages.start)
    whole = run(inputs, tmp_path / "whole", *trainer_flags(max_steps=4))
    assert fresh.batches == whole.batches
    assert json.loads((tmp_path / "out" / "run.json").read_text())["first_step"] == 0


def test_frozen_groups_stay_bit_by_bit_while_others_move(stages, inputs, tmp_path):
    start = stages.start
    before = load_file(start[1] / "model.safetensors")
    run(inputs, tmp_path, "--freeze-groups", "text", "--stop-at", "6", start=start)
    after = load_file(tmp_path / "model.safetensors")
    buffers = ("threshold", "balance_bias", "num_updates")
    for name, tensor in after.items():
        if name.endswith(buffers):
            continue
        moved = not torch.equal(tensor, before[name])
        assert moved != (".groups.text." in name), name
    assert any(".groups.text.experts" in name for name in after)


def test_unknown_group_to_freeze_is_named(stages, inputs, tmp_path):
    with pytest.raises(ValueError, match="audio.*text.*image"):
        build_trainer(
            parse_arguments(arguments(inputs, tmp_path, "--freeze-groups", "text", "audio", start=stages.start))
        )


@pytest.mark.parametrize(
    "field, value", [("modality_token_ranges", {"image": [[303, 334]]}), ("eos_token_id", 7), ("image_seq_length", 4)]
)
def test_model_that_reads_ids_otherwise_than_the_processor_is_refused(stages, inputs, tmp_path, field, value):
    model = MomaForCausalLM.from_pretrained(stages.start[1])
    config = {**model.config.to_dict(), field: value}
    shutil.copytree(stages.start[1], tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    with pytest.raises(ValueError, match=f"`--model` has {field} = "):
        build_trainer(parse_arguments(arguments(inputs, tmp_path / "out", start=("--model", tmp_path / "model"))))


def test_embeddings_may_have_more_rows_than_the_processor_has_tokens(stages, inputs, tmp_path):
    model = MomaForCausalLM.from_pretrained(stages.start[1])
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 8)
    model.save_pretrained(tmp_path / "more")
    build_trainer(parse_arguments(arguments(inputs, tmp_path / "out", start=("--model", tmp_path / "more"))))
    with pytest.raises(ValueError, match=f"vocab_size = {rows + 8}, the processor's is {rows + 9}"):
        check_layout(model.config, {"vocab_size": rows + 9})


def test_recipe_or_model_is_needed(tmp_path, capsys):
    paths = ["--processor", "p", "--tokens", "c", "--output", "o"]
    with pytest.raises(SystemExit):
        parse_arguments(paths)
    message = capsys.readouterr().err
    assert "RECIPE" in message and "--model" in message
    (tmp_path / "r.yaml").write_text("trainer: {max_steps: 3}\n")
    with pytest.raises(SystemExit):
        parse_arguments([str(tmp_path / "r.yaml"), *paths])
    assert "no section `model`" in capsys.readouterr().err
    assert parse_arguments([str(tmp_path / "r.yaml"), *paths, "--model", "m"]).trainer["max_steps"] == 3


@pytest.mark.parametrize("packed", [True, False])
def test_sequences_longer_than_the_model_reads_are_refused_before_the_first_step(inputs, tmp_path, packed):
    recipe = {"model": TRAINED, "data": {"sequence_length": 65, "packed": packed}}
    output, start = tmp_path / "out", (tmp_path / "recipe.json",)
    start[0].write_text(json.dumps(recipe))
    with pytest.raises(InputError, match="sequence_length = 65 .* exceeds .* `max_position_embeddings` = 64"):
        main(arguments(inputs, output, start=start))
    assert not output.exists()
    recipe["model"] = {**TRAINED, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
    start[0].write_text(json.dumps(recipe))
    assert len(build_trainer(parse_arguments(arguments(inputs, output, start=start))).train_dataset) == 32


class Diverge(TrainerCallback):
    """Makes the weights NaN before a step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("nan")


@pytest.mark.parametrize("logging_steps", ["1", "8"])
def test_a_loss_that_is_no_number_stops_the_training_and_keeps_what_was_saved(inputs, tmp_path, logging_steps):
    output = tmp_path / "out"
    often = trainer_flags(save_steps=2, save_total_limit=1, logging_steps=logging_steps)
    at_step = 5 if logging_steps == "1" else 6
    with pytest.raises(InputError, match=f"The loss is nan by step {at_step}: a lower .* '.*checkpoint-4', is kept"):
        run(inputs, output, *often, callbacks=[Diverge()])
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]
    assert all(value.isfinite().all() for value in load_file(output / "checkpoint-4" / "model.safetensors").values())
    assert not (output / "model.safetensors").exists()


@pytest.mark.parametrize("fp16", [False, True])
def test_gradients_without_a_norm_stop_a_training_that_would_not_pass_over_them(inputs, tmp_path, fp16):
    trainer = build_trainer(parse_arguments(arguments(inputs, tmp_path / "out")))
    trainer.args.fp16 = fp16
    trainer.log({"loss": 2.0, "grad_norm": 1.0})
    with nullcontext() if fp16 else pytest.raises(InputError, match="The norm of the gradients is inf by step 0"):
        trainer.log({"loss": 2.0, "grad_norm": float("inf")})


@pytest.mark.parametrize(
    "trainer, message",
    [
        ({"report_to": ["dvclive"]}, "dvclive to be installed"),
        ({"optim": "adamw_apex_fused"}, "apex"),
        ({"optim_args": "foreach"}, "optim_args|unpack|dictionary|expected"),
        ({"adam_beta2": 1.5}, "beta parameter at index 1: 1.5"),
    ],
)
def test_settings_that_need_what_is_not_there_are_told_in_one_line_before_the_first_step(
    inputs, tmp_path, trainer, message
):
    recipe = {"model": TRAINED, "trainer": trainer}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(InputError, match=f"section `trainer`, .*: .*({message})") as raised:
        main(arguments(inputs, tmp_path / "out", start=[tmp_path / "recipe.json"]))
    assert "\n" not in str(raised.value) and not (tmp_path / "out" / "run.json").exists()


class Recorder(TrainerCallback):
    """A logger, as of TensorBoard."""

    told = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keep what there is to log."""
        self.told.append(dict(logs))


def test_loggers_are_told_all_that_the_log_holds(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "told", [])
    (tmp_path / "recipe.json").write_text(json.dumps({"model": TRAINED, "trainer": {"report_to": ["recorder"]}}))
    main(arguments(inputs, tmp_path / "out", start=[tmp_path / "recipe.json"]))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert Recorder.told == [{name: log[name] for name in log if name != "step"} for log in history]
    assert any("eval_image_loss" in log for log in Recorder.told)


def test_a_step_does_not_read_its_loss_and_a_recipe_wins(inputs, tmp_path):
    args = parse_arguments(arguments(inputs, tmp_path / "out"))
    made = make_training_arguments(args)
    assert not made.logging_nan_inf_filter and not made.dataloader_pin_memory
    args.trainer |= {"logging_nan_inf_filter": True, "accelerator_config": {"non_blocking": True}}
    made = make_training_arguments(args)
    assert made.logging_nan_inf_filter and made.accelerator_config.non_blocking


def test_batches_go_to_a_gpu_from_pinned_memory():
    fields = feeding_fields("cuda")
    assert fields["dataloader_pin_memory"] and fields["accelerator_config"] == {"non_blocking": True}


@pytest.mark.parametrize(
    "implementation, why",
    [
        ("foo", "not supported"),
        pytest.param(
            "flash_attention_2",
            "installed",
            marks=pytest.mark.skipif(is_flash_attn_2_available(), reason="the package is installed"),
        ),
    ],
)
def test_attention_that_is_not_there_is_told_in_one_line(implementation, why):
    with pytest.raises(InputError, match=rf"--attn-implementation '{implementation}': .*{why}"):
        set_attention(tiny_model(), implementation)
