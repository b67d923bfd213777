# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerState

from helpers.tiny import tiny_model, tiny_processor
from modeling_moma import MomaConfig, UpcyclingReceipt
from modeling_moma.cli import upcycle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A seed as the Trainer saves it."""
    folder = tmp_path_factory.mktemp("seed") / "checkpoint-5"
    tiny_model(tiny_processor(), num_experts={"text": 1, "image": 1}).save_pretrained(folder)
    TrainerState(global_step=5, max_steps=20, train_batch_size=4).save_to_json(str(folder / "trainer_state.json"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"of the seed")
    return folder


@pytest.fixture(scope="module")
def wide_seed(tmp_path_factory):
    """A seed whose feed-forward layers make much of its output."""
    folder = tmp_path_factory.mktemp("wide_seed")
    tiny_model(tiny_processor(), num_experts={"text": 1, "image": 1}, initializer_range=0.2).save_pretrained(folder)
    return folder


def run(checkpoint, output, *more, to="4t4i"):
    target = [] if to is None else ["--to", to]
    upcycle.main(["--model", str(checkpoint), *target, "--output", str(output), *more])


def test_folder_is_a_model_with_its_receipt_and_the_position_in_the_data(checkpoint, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    output = tmp_path / "runs" / "upcycled"
    noise = ["--set", "model.gumbel_noise=0.5", "model.gumbel_noise_steps=30"]
    run(checkpoint, output, *noise, "--preserve-function")
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.num_experts == {"text": 4, "image": 4}
    assert (model.config.gumbel_noise, model.config.gumbel_noise_steps) == (0.5, 30)
    assert model.config.normalize_gates
    weights, seed = load_file(output / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    for expert in weights["model.layers.1.mlp.groups.image.experts.down_proj"]:
        assert torch.equal(expert, seed["model.layers.1.mlp.groups.image.mlp.down_proj.weight"])

    assert (output / "trainer_state.json").read_bytes() == before["trainer_state.json"]
    receipt = json.loads((output / "upcycling.json").read_text())
    assert receipt["arguments"]["to"] == "4t4i" and receipt["arguments"]["model"] == str(checkpoint)
    # two layers of two groups, each with two packed matrices and a router of four tensors
    assert receipt["data_order"] is None
    assert receipt["tensors"]["copied"] == 8 and receipt["tensors"]["new"] == 16
    assert set(receipt["coverage"]) == {"text", "image"}
    assert receipt["ffn_difference"]["text"][1] == pytest.approx(0, abs=1e-6)
    assert json.loads(capsys.readouterr().out) == {
        key: receipt[key] for key in receipt if key not in ("arguments", "data_order")
    }
    expected = {"config.json", "generation_config.json", "model.safetensors", "trainer_state.json", "upcycling.json"}
    # the code comes along, as with every saved model
    assert {path.name for path in output.iterdir() if path.suffix != ".py"} == expected
    assert [path.name for path in output.parent.iterdir()] == ["upcycled"]
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_without_a_target_text_keeps_its_network(wide_seed, tmp_path, capsys):
    run(wide_seed, tmp_path / "upcycled", to=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "upcycled")
    assert model.config.num_experts == {"text": 1, "image": 4}
    receipt = json.loads((tmp_path / "upcycled" / "upcycling.json").read_text())
    assert receipt["arguments"]["to"] is None
    assert receipt["output_differences"]["text"] == pytest.approx(0, abs=1e-6)
    assert receipt["output_differences"]["image"] > 0.05
    assert "upcycle: " not in capsys.readouterr().err


def test_command_says_when_text_has_moved_and_what_leaves_it(wide_seed, tmp_path, capsys):
    run(wide_seed, tmp_path / "upcycled")
    printed = capsys.readouterr()
    moved = json.loads(printed.out)["output_differences"]["text"]
    assert moved > 0.05
    (line,) = [line for line in printed.err.splitlines() if line.startswith("moma upcycle: ")]
    assert f"moves text by {moved:.2f} of its logits' norm" in line
    assert "without --to text stays as it is" in line and "--keep-seed keeps all of it" in line


@pytest.mark.parametrize("moved", [float("nan"), 0.0, 0.05])
def test_command_is_silent_where_text_hardly_moves(moved):
    receipt = UpcyclingReceipt({}, {}, output_differences={"text": moved})
    assert upcycle.text_moved(receipt, ["text", "image"]) is None


def test_what_leaves_text_is_told_where_there_is_more_than_text():
    receipt = UpcyclingReceipt({}, {}, output_differences={"text": 0.5})
    assert "without --to text stays as it is" in upcycle.text_moved(receipt, ["text", "image", "imago"])
    line = upcycle.text_moved(receipt, ["text"])
    assert "--to" not in line and "--keep-seed" in line


def test_seed_is_kept_beside_narrower_experts(wide_seed, tmp_path, capsys):
    run(wide_seed, tmp_path / "kept", "--keep-seed", "--set", "model.expert_intermediate_size=8")
    model, seed = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "kept", wide_seed))
    assert model.config.shared_expert_intermediate_size == {"text": 24, "image": 24}
    assert model.config.expert_intermediate_size == {"text": 8, "image": 8}
    printed = capsys.readouterr()
    receipt = json.loads(printed.out)
    assert receipt["output_differences"] == pytest.approx({"text": 0, "image": 0}, abs=1e-6)
    # two layers of two groups: three matrices of a shared expert; two packed ones and a router of four tensors
    assert (receipt["tensors"]["copied"], receipt["tensors"]["new"]) == (12, 24)
    assert "upcycle: " not in printed.err
    ids = upcycle.probe_batch(seed.config, length=12)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, seed(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--set", "model.expert_intermediate_size=8"], "`expert_intermediate_size` = 8 needs `keep_seed`"),
        (["--keep-seed", "--perturbation", "0.1"], "`perturbation` = 0.1 does not go with `keep_seed`"),
        (["--keep-seed", "--preserve-function"], "`preserve_function` does not go with `keep_seed`"),
    ],
)
def test_options_that_do_not_go_together_are_named(checkpoint, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run(checkpoint, tmp_path / "upcycled", *more)
    assert list(tmp_path.iterdir()) == []


def write_run(folder, **run):
    (folder / "run.json").write_text(json.dumps(run))


def test_receipt_tells_what_decided_on_the_order_of_the_seeds_data(checkpoint, tmp_path):
    seed = tmp_path / "seed"
    shutil.copytree(checkpoint, seed / "checkpoint-5")
    shutil.copytree(checkpoint, seed, dirs_exist_ok=True)
    write_run(seed, examples_a_step=8, first_step=0, fingerprint={"seed": {"seed": 3}})
    for source in (seed / "checkpoint-5", seed):
        run(source, tmp_path / f"from-{source.name}", "--seed", "1", to="2t1i")
        receipt = json.loads((tmp_path / f"from-{source.name}" / "upcycling.json").read_text())
        assert receipt["data_order"] == {"seed": 3, "examples_a_step": 8}
    # as runs were described once
    write_run(seed, examples_a_step=8)
    run(seed, tmp_path / "older", to="2t1i")
    assert json.loads((tmp_path / "older" / "upcycling.json").read_text())["data_order"] is None


def test_model_that_is_grown_once_more_keeps_the_order_of_its_data(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "seed")
    write_run(tmp_path / "seed", examples_a_step=8, fingerprint={"seed": {"seed": 3}})
    run(tmp_path / "seed", tmp_path / "same", to="1t1i")
    run(tmp_path / "same", tmp_path / "more", to="2t2i")
    receipt = json.loads((tmp_path / "more" / "upcycling.json").read_text())
    assert receipt["data_order"] == {"seed": 3, "examples_a_step": 8}


def test_seed_of_the_script_decides_everything_random(checkpoint, tmp_path):
    for name, seed in (("first", "1"), ("again", "1"), ("other", "2")):
        run(checkpoint, tmp_path / name, "--seed", seed, "--perturbation", "0.1", to="2t1i")
    first, again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again", "other"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    for name in ("router.weight", "experts.down_proj"):
        name = f"model.layers.0.mlp.groups.text.{name}"
        assert not torch.equal(first[name], other[name])


def test_model_without_a_trainer_state_gets_none(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "upcycled")
    assert not (tmp_path / "upcycled" / "trainer_state.json").exists()


@pytest.mark.parametrize("to, message", [("4t", "`name` = '4t'"), ("4t4i4t", "'4t4i'"), ("8x", "`num_experts` = 8")])
def test_bad_target_is_named_and_nothing_is_written(checkpoint, tmp_path, to, message):
    with pytest.raises(ValueError, match=message):
        run(checkpoint, tmp_path / "upcycled", to=to)
    assert list(tmp_path.iterdir()) == []


def test_folder_with_files_is_refused_and_kept(checkpoint, tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"of another model")
    with pytest.raises(ValueError, match="`--output`"):
        run(checkpoint, tmp_path)
    with pytest.raises(ValueError, match="`--output`"):
        run(checkpoint, checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer.pt"]


def test_a_model_of_text_alone_grows_experts(tmp_path):
    torch.manual_seed(0)
    ids = {"begin_image_token_id": None, "end_image_token_id": None}
    model = tiny_model(num_experts=1, modality_token_ranges={}, **ids)
    model.save_pretrained(tmp_path / "seed")
    run(tmp_path / "seed", tmp_path / "grown", to="8x")
    assert MomaConfig.from_pretrained(tmp_path / "grown").num_experts == 8


def test_probe_has_rows_of_every_modality():
    config = tiny_model(tiny_processor()).config
    ids = upcycle.probe_batch(config, rows=4, length=9)["input_ids"]
    ((start, stop),) = config.modality_token_ranges["image"]
    is_image = (ids >= start) & (ids < stop)
    assert ids.shape == (4, 9)
    assert is_image.all(dim=1).tolist() == [False, True, False, True]
    assert is_image.any(dim=1).tolist() == [False, True, False, True]
