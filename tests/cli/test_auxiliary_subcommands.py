# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, GenerationConfig, TrainingArguments

from helpers.processes import start_scripts
from helpers.tiny import tiny_model, tiny_processor, trainer_flags, write_tokens
from modeling_moma import MomaForCausalLM
from modeling_moma.calibration.auxiliary_training import auxiliary_report
from modeling_moma.calibration.observation import named_routers
from modeling_moma.calibration.thresholds import calibrate_auxiliary_thresholds, calibrate_thresholds
from modeling_moma.cli.calibrate import main as calibrate
from modeling_moma.cli.train_auxiliary_routers import main as train
from modeling_moma.cli.train_auxiliary_routers import parse_arguments
from modeling_moma.data.documents import open_documents
from modeling_moma.data.stream import DocumentExamples
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.measures import held_out_batches, load_model
from modeling_moma.training import auxiliary_routers
from release import main as release
from tokenization import MomaProcessor


REQUIRED = ["--model", "m", "--processor", "p", "--tokens", "t", "--output", "o"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A processor, codes, and a bf16 model with a depth layer; the first two in one folder with it."""
    folder = tmp_path_factory.mktemp("auxiliary")
    processor = tiny_processor()
    write_tokens(folder / "tokens", processor, codings=3, train=12, validation=9)
    model = tiny_model(
        processor, depth_layers=[0], depth_inference_routing="threshold", depth_capacity=0.5, initializer_range=0.2
    )
    model.save_pretrained(folder / "fp32")
    MomaForCausalLM.from_pretrained(folder / "fp32", dtype=torch.bfloat16).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def run(script, inputs, output, *more, model=None):
    model = str(model or inputs / "model")
    paths = ["--processor", str(inputs / "model"), "--tokens", str(inputs / "tokens"), "--output", str(output)]
    batch = trainer_flags(per_device_train_batch_size=4) if script is train else ["--batch-size", "4"]
    script(["--model", model, *paths, *batch, *more])
    return output


def auxiliary_run(inputs, output, *more):
    steps = trainer_flags(max_steps=4, eval_steps=4, save_steps=2, logging_steps=2, warmup_steps=0, learning_rate=0.02)
    return run(train, inputs, output, *steps, *more)


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    return auxiliary_run(inputs, tmp_path_factory.mktemp("trained"))


def batches_of(inputs):
    processor = MomaProcessor.from_pretrained(inputs / "model")
    return held_out_batches(open_documents(str(inputs / "tokens"), processor, "validation"), processor, 4, seed=0)


def main_weights(folder):
    return {name: value for name, value in load_file(folder / "model.safetensors").items() if "auxiliary" not in name}


def assert_same(first, second, except_for=()):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if not name.endswith(tuple(except_for)):
            assert value.dtype == second[name].dtype, name
            assert torch.equal(value, second[name]), name


def test_training_saves_a_model_that_uses_its_auxiliary_routers_and_is_else_the_same_bit_by_bit(inputs, trained):
    assert_same(main_weights(inputs / "model"), main_weights(trained))
    config = json.loads((trained / "config.json").read_text())
    assert config["auxiliary_routers"]
    assert config["inference_routing"] == "auxiliary"
    assert config["depth_inference_routing"] is None
    assert config["dtype"] == "bfloat16"

    model, source = MomaForCausalLM.from_pretrained(trained).eval(), load_model(inputs / "model", "cpu")
    for router in named_routers(model).values():
        assert router.auxiliary.threshold.dtype == torch.float32
        assert (router.auxiliary.threshold != 0.5).all()
    batch = batches_of(inputs)[0]
    with torch.no_grad():
        plain, chosen = (model(**batch, routing=routing).logits for routing in (None, "auxiliary"))
        assert torch.equal(plain, chosen)
        # nothing that the main routers decide has changed
        same = load_model(trained, "cpu")(**batch, routing="threshold").logits
        assert torch.equal(same, source(**batch, routing="threshold").logits)
    MomaProcessor.from_pretrained(trained)


def test_report_is_of_batches_that_had_no_part_in_the_calibration(inputs, trained):
    report = json.loads((trained / "auxiliary_routers.json").read_text())
    batches = batches_of(inputs)
    # two more examples do not fill a batch
    assert [len(batch["input_ids"]) for batch in batches] == [4] * 4
    assert (report["steps"], report["calibration_batches"], report["report_batches"]) == (4, 2, 2)
    model = load_model(trained, "cpu")
    assert report["routers"] == auxiliary_report(model, batches[2:])
    before = {name: router.auxiliary.threshold.clone() for name, router in named_routers(model).items()}
    calibrate_auxiliary_thresholds(model, batches[:2])
    for name, router in named_routers(model).items():
        assert torch.equal(router.auxiliary.threshold, before[name]), name


def test_paper_threshold_resume_and_a_model_that_has_auxiliary_routers(inputs, trained, tmp_path):
    auxiliary_run(inputs, tmp_path, "--threshold", "0.5")
    first = load_file(trained / "model.safetensors")
    again = load_file(tmp_path / "model.safetensors")
    # only the thresholds tell the two trainings apart
    assert_same(first, again, except_for=["auxiliary.threshold"])
    assert all((value == 0.5).all() for name, value in again.items() if name.endswith("auxiliary.threshold"))
    assert json.loads((tmp_path / "auxiliary_routers.json").read_text())["calibration_batches"] == 0

    # killed after the last checkpoint but one, before there was any result
    for path in tmp_path.iterdir():
        if path.name != "checkpoint-2":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    auxiliary_run(inputs, tmp_path, "--threshold", "0.5", "--resume", *trainer_flags(eval_steps=1, save_steps=4))
    assert_same(again, load_file(tmp_path / "model.safetensors"))
    # what is new among the arguments holds, although the checkpoint knows it otherwise
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry][-2:] == [3, 4]
    # its own results are no hindrance, to who resumes
    auxiliary_run(inputs, tmp_path, "--threshold", "0.5", "--resume")
    with pytest.raises(ValueError, match="files in it already"):
        auxiliary_run(inputs, tmp_path, "--threshold", "0.5")
    # goes on from the auxiliary routers that are there
    further = run(train, inputs, tmp_path / "further", *trainer_flags(max_steps=1, learning_rate=0), model=trained)
    assert_same(first, load_file(further / "model.safetensors"), except_for=["auxiliary.threshold"])


def test_a_longer_run_goes_on_with_rows_that_it_has_not_read(inputs, tmp_path, monkeypatch):
    read, own = [], DocumentExamples.__getitem__
    monkeypatch.setattr(DocumentExamples, "__getitem__", lambda self, index: read.append(index) or own(self, index))
    for steps, more in (("2", ()), ("5", ("--resume",))):
        auxiliary_run(inputs, tmp_path, "--threshold", "0.5", *trainer_flags(max_steps=steps), *more)
    assert [index for index in read if index is not None] == list(range(5 * 4))


def test_calibrate_changes_thresholds_alone(inputs, trained, tmp_path):
    plain = run(calibrate, inputs, tmp_path / "plain", "--batches", "2")
    changed = (".threshold", ".num_updates")
    assert_same(main_weights(inputs / "model"), main_weights(plain), except_for=changed)
    model = load_model(inputs / "model", "cpu")
    rows = calibrate_thresholds(model, batches_of(inputs)[:2])
    saved = load_model(plain, "cpu")
    for name, router in named_routers(model).items():
        assert torch.equal(router.threshold, saved.get_submodule(name).threshold)
        assert (saved.get_submodule(name).num_updates == 2).all()
    report = json.loads((plain / "calibration.json").read_text())
    assert report["threshold"] == rows
    assert "auxiliary" not in report

    both = run(calibrate, inputs, tmp_path / "both", "--batches", "3", model=trained)
    report = json.loads((both / "calibration.json").read_text())
    assert report["batches"] == 3
    assert set(report["auxiliary"][0]["rules"]) == {"auxiliary"}
    state, new = (load_file(folder / "model.safetensors") for folder in (trained, both))
    assert_same(state, new, except_for=changed)
    for name in state:
        assert name.endswith("threshold") != torch.equal(state[name], new[name]) or "num_updates" in name, name
    assert json.loads((both / "config.json").read_text())["inference_routing"] == "auxiliary"


def test_calibrate_in_bf16_keeps_the_weights_of_an_fp32_model_bit_by_bit(inputs, tmp_path):
    source = inputs / "fp32"
    found = run(calibrate, inputs, tmp_path / "half", "--batches", "2", "--dtype", "bfloat16", model=source)
    assert_same(main_weights(source), main_weights(found), except_for=["threshold", "num_updates"])
    before, after = (MomaForCausalLM.from_pretrained(folder) for folder in (source, found))
    for name, router in named_routers(before).items():
        assert not torch.equal(router.threshold, after.get_submodule(name).threshold)
    assert json.loads((found / "config.json").read_text())["dtype"] == "float32"


def test_calibrate_sets_the_routing_that_it_is_told(inputs, trained, tmp_path):
    main = run(
        calibrate, inputs, tmp_path / "main", "--batches", "1", "--inference-routing", "threshold", model=trained
    )
    config = MomaForCausalLM.from_pretrained(main).config
    assert (config.inference_routing, config.depth_inference_routing) == ("threshold", None)
    back = run(calibrate, inputs, tmp_path / "back", "--batches", "1", "--inference-routing", "auxiliary", model=main)
    assert MomaForCausalLM.from_pretrained(back).config.inference_routing == "auxiliary"
    with pytest.raises(ValueError, match="`--inference-routing` is auxiliary, but `--model` has no auxiliary routers"):
        run(calibrate, inputs, tmp_path / "never", "--inference-routing", "auxiliary")
    assert not (tmp_path / "never").exists()


def test_a_run_goes_on_from_its_own_checkpoints_alone(inputs, trained, tmp_path, capsys):
    shutil.copytree(trained / "checkpoint-4", tmp_path / "out" / "checkpoint-4")
    before = sorted((tmp_path / "out").rglob("*"))
    for more, difference in (
        (trainer_flags(seed=1), "seed = 0 there and 1"),
        (trainer_flags(per_device_train_batch_size=2), "examples_a_step = 4"),
    ):
        with pytest.raises(ValueError, match=f"holds another run: of checkpoint-4 .*{difference}"):
            auxiliary_run(inputs, tmp_path / "out", "--resume", *more)
    other = MomaForCausalLM.from_pretrained(inputs / "model")
    other.lm_head.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds another run: of checkpoint-4 .*weights = "):
        run(train, inputs, tmp_path / "out", *trainer_flags(max_steps=4), "--resume", model=tmp_path / "other")
    assert sorted((tmp_path / "out").rglob("*")) == before
    torn = tmp_path / "torn" / "checkpoint-4"
    shutil.copytree(trained / "checkpoint-4", torn, ignore=shutil.ignore_patterns("optimizer.pt"))
    with pytest.raises(InputError, match="checkpoint-4' has no optimizer.pt, without which it would begin anew"):
        auxiliary_run(inputs, torn.parent, "--resume")
    capsys.readouterr()
    auxiliary_run(inputs, tmp_path / "out", "--resume")
    told = capsys.readouterr().out
    assert "has taken all of its 4 steps; its routers are judged anew" in told and "train_loss" not in told
    assert_same(load_file(trained / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors"))


def test_two_processes_judge_the_routers_by_the_same_tokens_as_one(inputs, tmp_path):
    # nine documents: the last batch of two processes is filled up
    sizes = trainer_flags(per_device_train_batch_size=2, max_steps=2, eval_steps=2, logging_steps=2, warmup_steps=0)
    paths = ["--model", inputs / "model", "--processor", inputs / "model", "--tokens", inputs / "tokens"]

    def given(output, accumulation):
        more = ["--output", output, *trainer_flags(gradient_accumulation_steps=accumulation)]
        return list(map(str, [*paths, *sizes, *more]))

    for process in start_scripts(train, given(tmp_path / "two", 1), tmp_path / "log.txt"):
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "log.txt").read_text()[-3000:]
    train(given(tmp_path / "one", 2))
    folders = [tmp_path / name for name in ("two", "one")]
    reports = [json.loads((folder / "auxiliary_routers.json").read_text()) for folder in folders]
    two, one = ([row["tokens"] for row in report["routers"]] for report in reports)
    assert two == one
    histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in folders]
    for name in ("eval_accuracy", "eval_load", "eval_true_load"):
        figures = [[log[name] for log in history if name in log] for history in histories]
        assert figures[0] == pytest.approx(figures[1], abs=1e-6), name


def test_folders_of_other_models_are_refused(inputs, trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(inputs / "model", other)
    (other / "checkpoint-2").mkdir()
    before = sorted(path.name for path in other.rglob("*"))
    with pytest.raises(ValueError, match="`--output`.*give a new folder"):
        run(calibrate, inputs, other)
    for more in ([], ["--resume"]):
        with pytest.raises(ValueError, match="`--output`.*give a new folder"):
            auxiliary_run(inputs, other, *more)
    assert sorted(path.name for path in other.rglob("*")) == before


def test_a_released_model_has_no_noise_of_a_training_stage(inputs, tmp_path):
    model = load_model(inputs / "model", "cpu")
    model.config.gumbel_noise, model.config.gumbel_noise_steps = 1.0, 100
    model.save_pretrained(tmp_path / "noisy")
    folders = ["--model", str(tmp_path / "noisy"), "--processor", str(inputs / "model")]
    release([*folders, "--output", str(tmp_path / "released")])
    released = MomaForCausalLM.from_pretrained(tmp_path / "released")
    assert (released.config.gumbel_noise, released.config.gumbel_noise_steps) == (0.0, None)
    assert_same(load_file(inputs / "model" / "model.safetensors"), load_file(tmp_path / "released/model.safetensors"))


def test_a_released_model_begins_texts_with_a_name_where_it_is_told_to(inputs, tmp_path, capsys):
    processor = AutoProcessor.from_pretrained(inputs / "model")
    call = ["--model", str(inputs / "model"), "--processor", str(inputs / "model")]
    call += ["--output", str(tmp_path / "released")]
    word = processor.tokenizer("a", add_special_tokens=False)["input_ids"]
    assert release([*call, "--never-first", "a"]) == 0
    released = MomaForCausalLM.from_pretrained(tmp_path / "released")
    # kept by whoever loads and saves it
    released.save_pretrained(tmp_path / "again")
    for folder in ("released", "again"):
        settings = GenerationConfig.from_pretrained(tmp_path / folder)
        assert settings.caption_suppress_tokens == [processor.tokenizer.eos_token_id, *word]
        assert not settings._from_model_config
    assert release([*call, "--never-first", "two words"]) == 2
    assert "--never-first 'two words': it is" in capsys.readouterr().err


def test_a_release_says_how_images_are_drawn(inputs, tmp_path, capsys):
    call = ["--model", str(inputs / "model"), "--processor", str(inputs / "model"), "--output"]
    assert release([*call, str(tmp_path / "a"), "--draw-temperature", "0.7", "--draw-guidance", "5"]) == 0
    own = GenerationConfig.from_pretrained(tmp_path / "a").image_sampling
    assert own == {"do_sample": True, "temperature": 0.7, "top_k": 0, "guidance_scale": 5.0}
    assert release([*call, str(tmp_path / "b")]) == 0
    assert not hasattr(GenerationConfig.from_pretrained(tmp_path / "b"), "image_sampling")
    for flags, said in (
        (["--draw-guidance", "5"], "without --draw-temperature nothing is sampled"),
        (["--draw-temperature", "0"], "--draw-temperature 0.0: it must be a number above 0"),
        (["--draw-temperature", "nan"], "--draw-temperature nan"),
        (["--draw-temperature", "1", "--draw-guidance", "1"], "--draw-guidance 1.0: it must be a number above 1"),
    ):
        assert release([*call, str(tmp_path / "c"), *flags]) == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_release_is_rounded_but_for_its_routers(inputs, tmp_path):
    folders = [str(inputs / "model"), str(tmp_path / "released")]
    assert release(["--model", folders[0], "--processor", folders[0], "--output", folders[1]]) == 0
    first, second = (load_file(f"{folder}/model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    for name, tensor in second.items():
        torch.testing.assert_close(tensor, first[name].to(tensor.dtype), rtol=0, atol=0, msg=name)
        assert ("router" in name) <= (tensor.dtype != torch.bfloat16), name


def test_a_model_that_is_none_is_not_released(inputs, tmp_path, capsys):
    model = load_model(inputs / "model", "cpu")
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "diverged")
    tiny_processor(codes=64).save_pretrained(tmp_path / "other")
    asked = {
        (tmp_path / "diverged", inputs / "model"): "'model.norm.weight' holds NaN",
        (inputs / "model", tmp_path / "other"): "the processor's is",
        (tmp_path / "no", inputs / "model"): "there is no folder",
    }
    for (folder, processor), message in asked.items():
        found = ["--model", str(folder), "--processor", str(processor), "--output", str(tmp_path / "released")]
        assert release(found) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "released").exists()


def test_bad_arguments_are_refused(inputs, tmp_path):
    for name in ("--batches", "--batch-size"):
        with pytest.raises(SystemExit):
            run(calibrate, inputs, tmp_path / "never", name, "0")
    with pytest.raises(SystemExit):
        auxiliary_run(inputs, tmp_path, "--threshold", "1.5")
    with pytest.raises(ValueError, match="two are needed"):
        run(train, inputs, tmp_path / "never", *trainer_flags(max_steps=1, per_device_train_batch_size=40))
    assert not (tmp_path / "never").exists()
    other = tiny_model(tiny_processor(codes=64))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="were they made together"):
        run(calibrate, inputs, tmp_path / "never", model=tmp_path / "other")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((f"{name}_steps", 0) for name in ("eval", "save", "logging", "gradient_accumulation", "max")),
        ("per_device_train_batch_size", 0),
        *((name, -1) for name in ("max_steps", "warmup_steps", "learning_rate", "weight_decay")),
    ],
)
def test_numbers_that_no_training_takes_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"section `trainer`: {name} = {value}"):
        parse_arguments([*REQUIRED, *trainer_flags(**{name: value})])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("trainer.max_step=3", "Did you mean 'max_steps'"),
        ("model.hidden_size=8", "this command reads trainer alone"),
        ("trainer.max_steps", "is no section.field=value"),
        ("trainer.bf16=[", "cannot be read as YAML"),
    ],
)
def test_changes_that_set_nothing_are_refused(change, says):
    with pytest.raises(InputError, match=says):
        parse_arguments([*REQUIRED, "--set", change])


def test_every_process_loads_onto_its_own_device(inputs, tmp_path, monkeypatch):
    class Loaded(Exception):
        pass

    def load(folder, device):
        raise Loaded(str(device))

    monkeypatch.setattr(auxiliary_routers, "load_model", load)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda", 3))
    with pytest.raises(Loaded, match="cuda:3"):
        auxiliary_run(inputs, tmp_path)
