# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in shards: taken up by other numbers of processes and in other layouts, and exported in one piece."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from helpers.fsdp2 import sharded_training
from helpers.parallel_reference import IMAGES, MIXED, MODELS, SEED, TEXT, train
from helpers.processes import run_group, start_scripts
from helpers.slow import RUN_SLOW, slow
from helpers.tiny import logged_losses, tiny_model, tiny_processor, trainer_flags, write_tokens, write_training
from modeling_moma import MomaForCausalLM
from modeling_moma.cli import pretrain
from modeling_moma.errors_moma import InputError
from modeling_moma.training.checkpoints import DEEPSPEED, SHARDS, WHOLE, check_kind, copy_checkpoint


PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "scaling.md"
STEPS = 4
SAVED = {
    "sharded": {"fsdp_size": 4},
    "replicated_expert": {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
}
LOADED = {2: [{"fsdp_size": 2, "ep_size": 2}], 1: [{}]}
if RUN_SLOW:
    SAVED["replicated"] = {"dp_replicate_size": 2, "fsdp_size": 2}
    LOADED[2].append({"fsdp_size": 2})
# all processes have the same, so that their number changes nothing
BEFORE, AFTER = [MIXED, TEXT], [IMAGES, MIXED]
CODE = {"AutoModelForCausalLM": "modeling_moma.MomaForCausalLM"}


def documented():
    """The functions of the page."""
    (code,) = re.findall(r"```python\n(from pathlib import Path\n.*?)```", PAGE.read_text(), flags=re.DOTALL)
    functions = {}
    exec(code, functions)
    return SimpleNamespace(**functions)


def goes_on(model, optimizer):
    steps = train(model, optimizer, AFTER)
    return {"losses": torch.stack([step["loss"] for step in steps]), **steps[-1]["buffers"]}


def save_work(rank, folder):
    """One of four processes trains in each layout, saves, and goes on."""
    page = documented()
    for name, layout in SAVED.items():
        model, optimizer = page.load(folder / "model", **layout)
        train(model, optimizer, BEFORE)
        page.save(model, optimizer, folder / name)
        result = goes_on(model, optimizer)
        model.save_pretrained(folder / f"{name}-end")
        if rank == 0:
            torch.save(result, folder / f"{name}.pt")


def load_work(rank, folder, num_processes):
    """One of fewer processes goes on from each checkpoint in each of their layouts."""
    page, results = documented(), {}
    for name in SAVED:
        for place, layout in enumerate(LOADED[num_processes]):
            results[name, place] = goes_on(*page.load(folder / name, **layout))
    torch.save(results, folder / f"{num_processes}-{rank}.pt")


@pytest.fixture(scope="module", params=MODELS if RUN_SLOW else ["depth"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(seed=SEED, **MODELS[request.param]).save_pretrained(folder / "model")
    run_group(save_work, folder, num_processes=4)
    return folder


@pytest.mark.parametrize("num_processes", LOADED)
def test_fewer_processes_go_on_as_all_would_have(saved, num_processes):
    run_group(load_work, saved, num_processes, num_processes=num_processes)
    for rank in range(num_processes):
        for (name, place), result in torch.load(saved / f"{num_processes}-{rank}.pt").items():
            expected = torch.load(saved / f"{name}.pt")
            assert result.keys() == expected.keys() and any(key.endswith("threshold") for key in result)
            for key, value in expected.items():
                message = f"{name}, {LOADED[num_processes][place]}, {key}"
                torch.testing.assert_close(result[key], value, atol=1e-5, rtol=1e-5, msg=message)


@pytest.mark.parametrize("name", SAVED)
def test_exported_model_is_whole(saved, tmp_path, name):
    page = documented()
    page.export(saved / name, tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    model, optimizer = page.load(saved / name)
    exported = MomaForCausalLM.from_pretrained(tmp_path / "exported")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in exported.state_dict().items())
    torch.testing.assert_close(exported.eval()(MIXED).logits, model.eval()(MIXED).logits, atol=1e-5, rtol=1e-5)
    # what all processes wrote together at the end
    goes_on(model.train(), optimizer)
    end = MomaForCausalLM.from_pretrained(saved / f"{name}-end")
    torch.testing.assert_close(end.eval()(MIXED).logits, model.eval()(MIXED).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["", "-end"])
def test_code_of_a_sharded_model_is_its_own(saved, name):
    folder = saved / f"sharded{name}"
    assert CODE.items() <= json.loads((folder / "config.json").read_text())["auto_map"].items()
    assert (folder / "modeling_moma.py").is_file() and not list(folder.glob("_fsdp*"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    processor = write_training(folder)
    shutil.rmtree(folder / "tokens")
    write_tokens(folder / "tokens", processor, packed=True, train=60, validation=4)
    # nothing is drawn by one of several processes that share the weights
    recipe = json.loads((folder / "recipe.json").read_text())
    samples = {"every": 1, "prompts": ["red"], "images": 1, "max_new_tokens": 2}
    (folder / "recipe.json").write_text(json.dumps({**recipe, "samples": samples}))
    return folder


def arguments(inputs, output, *more):
    paths = [text for name in ("processor", "tokens") for text in (f"--{name}", str(inputs / name))]
    sizes = {"max_steps": STEPS, "per_device_train_batch_size": 1, "eval_steps": 9, "warmup_steps": 1, "bf16": False}
    given = ["--output", str(output), *trainer_flags(**sizes, save_steps=1, logging_steps=1), "--resume"]
    return [str(inputs / "recipe.json"), *paths, *given, *more]


def run_sharded(folder, number, processes, dies_in, given):
    """One start under FSDP2."""
    given = [str(folder / "rows"), str(number), str(dies_in), *given]
    for process in start_scripts(sharded_training, given, folder / "log.txt", processes):
        process.join(120)
        assert process.exitcode == (9 if dies_in else 0), (folder / "log.txt").read_text()[-3000:]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A pre-training under FSDP2 with 2 processes and with 4, of which all but the last die."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rows").mkdir()
    starts = [(4, 1, 2), (2, 2, 3), (4, 1, 0)] if RUN_SLOW else [(2, 2, 3), (4, 1, 0)]
    for number, (processes, accumulation, dies_in) in enumerate(starts):
        more = trainer_flags(gradient_accumulation_steps=accumulation)
        run_sharded(folder, number, processes, dies_in, arguments(inputs, folder / "out", *more))
    return folder / "out"


def test_pre_training_reshards_its_checkpoints(inputs, trained, tmp_path):
    pretrain.main(arguments(inputs, tmp_path / "one", *trainer_flags(gradient_accumulation_steps=4)))
    assert len(logged_losses(trained)) == STEPS
    assert logged_losses(trained) == pytest.approx(logged_losses(tmp_path / "one"), abs=1e-5)
    assert len(list((tmp_path / "one" / "samples").glob("*.json"))) == STEPS and not (trained / "samples").exists()
    # a shard of each process, and no model in one piece
    last = trained / f"checkpoint-{STEPS}"
    assert len(list((last / SHARDS).glob("*.distcp"))) == 4 and not list(last.glob("*.safetensors"))


def test_losses_and_the_best_checkpoint_are_those_of_one_process(inputs, tmp_path):
    recipe = json.loads((inputs / "recipe.json").read_text())
    recipe["trainer"] = {"load_best_model_at_end": True}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "rows").mkdir()
    outputs = [tmp_path / "sharded", tmp_path / "one"]
    given = [
        arguments(inputs, output, *trainer_flags(eval_steps=2, save_steps=2, gradient_accumulation_steps=number))
        for output, number in zip(outputs, ("2", "4"), strict=True)
    ]
    for entry in given:
        entry[0] = str(tmp_path / "recipe.json")
    # every process loads the best checkpoint, or none of them would end
    run_sharded(tmp_path, 0, 2, 0, given[0])
    pretrain.main(given[1])
    sharded, one = (json.loads((output / "trainer_state.json").read_text()) for output in outputs)
    assert Path(sharded["best_model_checkpoint"]).name == Path(one["best_model_checkpoint"]).name
    for name in ("loss", "eval_loss"):
        figures = [[log[name] for log in state["log_history"] if name in log] for state in (sharded, one)]
        assert figures[0] == pytest.approx(figures[1], abs=1e-4), name
    weights = [dict(MomaForCausalLM.from_pretrained(output).named_parameters()) for output in outputs]
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "given, told",
    [
        (["--lora-rank", "2"], "`--lora-rank` merges adapters into weights that FSDP and DeepSpeed would split"),
        (["--train-groups", "text"], "trains single rows of the embeddings, which FSDP and DeepSpeed would split"),
    ],
    ids=["adapters", "groups"],
)
def test_what_needs_whole_weights_is_refused_under_fsdp(inputs, tmp_path, given, told):
    (tmp_path / "rows").mkdir()
    entry = [str(tmp_path / "rows"), "0", "0", *arguments(inputs, tmp_path / "out", *given)]
    for process in start_scripts(sharded_training, entry, tmp_path / "log.txt", 1):
        process.join(120)
        assert process.exitcode == 1
    assert told in (tmp_path / "log.txt").read_text()


# one process goes on from a plain model in tests/training/test_pretrain.py
@slow
def test_second_stage_under_fsdp_begins_with_a_plain_model(inputs, tmp_path):
    (tmp_path / "rows").mkdir()
    recipe, *given = arguments(
        inputs, tmp_path / "first", *trainer_flags(gradient_accumulation_steps=4), "--stop-at", "2"
    )
    pretrain.main([recipe, *given])

    def second(output, accumulation):
        more = ["--model", str(tmp_path / "first"), *trainer_flags(gradient_accumulation_steps=accumulation)]
        return arguments(inputs, tmp_path / output, *more)[1:]

    run_sharded(tmp_path, 0, 2, 0, second("sharded", 2))
    pretrain.main(second("one", 4))
    assert len(logged_losses(tmp_path / "sharded")) == STEPS
    assert logged_losses(tmp_path / "sharded") == pytest.approx(logged_losses(tmp_path / "one"), abs=1e-5)


def test_pre_training_leaves_a_whole_model_at_its_end(trained, tmp_path):
    model = MomaForCausalLM.from_pretrained(trained)
    dcp_to_torch_save(trained / f"checkpoint-{STEPS}" / SHARDS, tmp_path / "weights.pt")
    expected = torch.load(tmp_path / "weights.pt")["model"]
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert CODE.items() <= json.loads((trained / "config.json").read_text())["auto_map"].items()


def test_stage_killed_after_its_last_shards_is_written_whole(trained, tmp_path):
    expected, last = MomaForCausalLM.from_pretrained(trained), trained / f"checkpoint-{STEPS}"
    copy_checkpoint(last, last, tmp_path / "out", tiny_processor(), MomaForCausalLM(expected.config))
    copied = MomaForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, copied.state_dict()[name]) for name, value in expected.state_dict().items())
    assert (tmp_path / "out" / "trainer_state.json").is_file() and not (tmp_path / "out" / SHARDS).exists()


def test_shards_are_refused_without_fsdp(inputs, trained, tmp_path):
    shutil.copytree(trained / f"checkpoint-{STEPS}", tmp_path / "out" / f"checkpoint-{STEPS}")
    more = trainer_flags(gradient_accumulation_steps=4, max_steps=STEPS + 1)
    with pytest.raises(
        InputError, match="checkpoint-4' was written by FSDP with .*SHARDED.* without FSDP.*start it as"
    ):
        pretrain.main(arguments(inputs, tmp_path / "out", *more))


def test_kinds_of_checkpoints(tmp_path):
    for name in ("optimizer.pt", "scheduler.pt"):
        with pytest.raises(InputError, match=f"has no {name}, without which .* was it copied as a whole"):
            check_kind(tmp_path, None)
        (tmp_path / name).touch()
    check_kind(tmp_path, None)
    with pytest.raises(InputError, match="written by a run without FSDP.* this is FSDP .*FULL_STATE_DICT"):
        check_kind(tmp_path, WHOLE)
    (tmp_path / "latest").touch()
    check_kind(tmp_path, DEEPSPEED)
    with pytest.raises(InputError, match="written by DeepSpeed, and this is a run without FSDP and DeepSpeed"):
        check_kind(tmp_path, None)
    (tmp_path / WHOLE).touch()
    check_kind(tmp_path, WHOLE)
    with pytest.raises(InputError, match="written by FSDP .*FULL_STATE_DICT.* this is FSDP .*SHARDED_STATE_DICT"):
        check_kind(tmp_path, SHARDS)
