# SPDX-License-Identifier: Apache-2.0
"""A mixture of every kind of source through the commands, from the files of a user to figures and images."""

import json
import random
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from helpers.mixture import MODEL, WEIGHTS, write_mixture
from helpers.processes import start_script, start_scripts
from helpers.slow import RUN_SLOW, slow
from helpers.tiny import tiny_model, tiny_processor, trainer_flags
from modeling_moma import MomaConfig, MomaMetricsCallback
from modeling_moma.cli import build_processor, pretrain, tokenize
from modeling_moma.cli.evaluate import main as evaluate
from modeling_moma.data.documents import TokenFolder
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.held_out import read_held_out
from modeling_moma.training.pretraining import build_trainer, packing, read_parts, training_stream
from modeling_moma.training.recipe import DataFields, SampleFields
from modeling_moma.training.samples import SampleCallback, image_grid
from tokenization import MomaProcessor


# by the number of processes, each of which takes its time to start
KILLS, STEPS = ({1: 10, 2: 5}, 60) if RUN_SLOW else ({1: 3, 2: 2}, 24)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    tiny_processor().save_pretrained(folder / "processor")
    recipe = write_mixture(folder / "data", max_steps=12, eval_steps=6, save_steps=6, logging_steps=3)
    tokenize.main(
        [str(recipe), "--processor", f"{folder}/processor", "--output", f"{folder}/tokens", "--processes", "1"]
    )
    return folder


def arguments(inputs, output, *more):
    paths = ["--processor", str(inputs / "processor"), "--tokens", str(inputs / "tokens"), "--output", str(output)]
    return [str(inputs / "data" / "recipe.yaml"), *paths, *more]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    pretrain.main(arguments(inputs, output))
    return output


def history(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_logs_tell_losses_by_source_and_how_the_training_is_fed(trained):
    logs = history(trained)
    last = {key: value for log in logs for key, value in log.items()}
    for source in WEIGHTS:
        assert last[f"eval_{source}_loss"] > 0 and last[f"eval_{source}_text_loss"] > 0
    assert last["eval_photos_image_loss"] > 0 and last["eval_pages_image_loss"] > 0
    # texts hold no image
    assert "eval_lines_image_loss" not in last or last["eval_lines_image_loss"] == 0
    training = [log for log in logs if "loss" in log]
    assert len(training) == 4
    for log in training:
        assert 0 <= log["padding_share"] < 0.02 and log["tokens_per_second"] > 0 and 0 <= log["data_wait_share"] < 1
        assert {"text_loss", "image_loss", "text_peak_load", "image_peak_load"} <= log.keys()
    shares = [training[-1][f"{source}_share"] for source in WEIGHTS]
    # of 24 sequences only
    assert shares == pytest.approx(list(WEIGHTS.values()), abs=0.06)
    assert [training[-1][f"{source}_weight"] for source in WEIGHTS] == pytest.approx(list(WEIGHTS.values()))


def test_flops_are_counted_for_the_experts_that_a_token_meets(trained):
    state = json.loads((trained / "trainer_state.json").read_text())
    config = MomaConfig.from_pretrained(trained)
    assert not config.tie_word_embeddings
    met = config.num_parameters(active=True) - 2 * config.vocab_size * config.hidden_size
    assert state["total_flos"] == pytest.approx(6 * state["global_step"] * 2 * 96 * met)


def test_logs_tell_passes_over_every_source_and_no_epoch_of_all(inputs, trained):
    logs = history(trained)
    assert not any("epoch" in log for log in logs)
    last = [log for log in logs if "loss" in log][-1]
    tokens, manifest = 12 * 2 * 96, json.loads((inputs / "tokens" / "manifest.json").read_text())["sources"]
    for source, weight in WEIGHTS.items():
        train = manifest[source]["splits"]["train"]
        assert last[f"{source}_epoch"] == pytest.approx(weight * tokens / sum(train["tokens"].values()), rel=0.1)


def test_epoch_of_one_source_is_its_passes(inputs, tmp_path):
    recipe = yaml.safe_load((inputs / "data" / "recipe.yaml").read_text())
    recipe["sources"] = {"lines": recipe["sources"]["lines"]}
    recipe["samples"] = {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for packed in ("true", "false"):
        text = (tmp_path / "recipe.yaml").read_text().replace("packed: true", f"packed: {packed}")
        (tmp_path / f"{packed}.yaml").write_text(text)
        pretrain.main([str(tmp_path / f"{packed}.yaml"), *arguments(inputs, tmp_path / packed)[1:]])
        logs = [log for log in history(tmp_path / packed) if "loss" in log]
        manifest = json.loads((inputs / "tokens" / "manifest.json").read_text())["sources"]["lines"]["splits"]["train"]
        passes = 24 * 96 / sum(manifest["tokens"].values()) if packed == "true" else 24 / manifest["documents"]
        assert logs[-1]["epoch"] == logs[-1]["lines_epoch"] == pytest.approx(passes, rel=0.1)


def test_best_model_of_several_sources_goes_by_a_loss_that_there_is(inputs, tmp_path):
    recipe = yaml.safe_load((inputs / "data" / "recipe.yaml").read_text())

    def trainer(**fields):
        recipe["trainer"] |= {"load_best_model_at_end": True, **fields}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        given = [str(tmp_path / "recipe.yaml"), *arguments(inputs, tmp_path / "out")[1:]]
        return build_trainer(pretrain.parse_arguments(given))

    with pytest.raises(InputError, match="metric_for_best_model = 'loss'.*such as 'eval_lines_loss'"):
        trainer()
    with pytest.raises(InputError, match="metric_for_best_model = 'photos_nonsense'.*such as 'eval_lines_loss'"):
        trainer(metric_for_best_model="photos_nonsense")
    assert trainer(metric_for_best_model="photos_loss").args.metric_for_best_model == "photos_loss"


def test_a_loss_of_a_modality_that_a_source_does_not_have_is_named(inputs, tmp_path):
    recipe = yaml.safe_load((inputs / "data" / "recipe.yaml").read_text())
    best = {"load_best_model_at_end": True, "metric_for_best_model": "lines_image_loss"}
    recipe["trainer"] |= {**best, "max_steps": 1, "eval_steps": 1, "save_steps": 1, "eval_on_start": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError, match="metric_for_best_model.*'eval_lines_image_loss'.*eval_photos_image_loss"):
        pretrain.main([str(tmp_path / "recipe.yaml"), *arguments(inputs, tmp_path / "out")[1:]])


def test_a_best_model_needs_held_out_documents(tmp_path):
    tiny_processor().save_pretrained(tmp_path / "processor")
    (tmp_path / "lines.txt").write_text("green apple\n" * 10)
    sources = {"lines": {"data": str(tmp_path / "lines.txt"), "text": "text", "held_out": 0}}
    trainer = {"load_best_model_at_end": True, "max_steps": 2}
    recipe = {"sources": sources, "data": {"sequence_length": 96}, "model": MODEL, "trainer": trainer}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    given = [str(tmp_path / "recipe.yaml"), "--processor", str(tmp_path / "processor")]
    tokenize.main([*given, "--output", str(tmp_path / "tokens"), "--processes", "1"])
    given += ["--tokens", str(tmp_path / "tokens"), "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match="load_best_model_at_end = True, and no source has held-out documents"):
        build_trainer(pretrain.parse_arguments(given))


def test_what_a_recipe_leaves_open_of_its_data_is_as_the_tokens_have_it(inputs):
    tokens = TokenFolder(inputs / "tokens", tiny_processor())
    assert packing(None, tokens) == packing(DataFields(), tokens) == (True, 96)
    tokens.manifest["packed"] = False
    assert packing(DataFields(), tokens) == (False, 96)
    assert packing(DataFields(sequence_length=128), tokens) == (False, 128)
    assert packing(DataFields(packed=True), tokens) == (True, 96)
    assert DataFields().to_tokenize() == (512, True) and DataFields(64, False).to_tokenize() == (64, False)


def test_samples_show_drawings_and_captions(trained):
    names = sorted(path.name for path in (trained / "samples").iterdir())
    assert names == [f"step-{step:06d}.{ending}" for step in (4, 8, 12) for ending in ("json", "png")]
    sample = json.loads((trained / "samples" / "step-000008.json").read_text())
    assert sample["prompts"] == ["thing 1", "thing 2"] and len(sample["captions"]) == 2
    assert sample["captions"][0]["reference"].startswith("thing ")
    # two rows of two images of 16 pixels
    assert Image.open(trained / "samples" / "step-000008.png").size == (44, 44)


def test_samples_of_any_rectangle_stand_beside_and_below_one_another():
    # as images of Janus and Emu3 may be
    red, blue = (Image.new("RGB", (8, 16), colour) for colour in ("red", "blue"))
    grid = image_grid([[red, red], [blue]], gap=2)
    assert grid.size == (22, 38)
    assert grid.getpixel((9, 17)) == (255, 0, 0) and grid.getpixel((2, 20)) == (0, 0, 255)


def test_samples_are_decoded_where_the_model_is(inputs, monkeypatch):
    processor = MomaProcessor.from_pretrained(inputs / "processor")
    moves = []
    monkeypatch.setattr(processor, "to", lambda device: moves.append(str(device)) or processor)
    callback = SampleCallback(SampleFields(every=1), processor, [], MomaMetricsCallback())
    codes = torch.zeros(2, processor.image_seq_length, dtype=torch.long)
    assert len(callback._decode(codes, torch.device("cuda", 0))) == 2
    assert moves == ["cuda:0", "cpu"]


@pytest.mark.parametrize(
    "prompts, said",
    [
        (["thing", "red " * 200], r"prompts\[1\] = '(red )+\.\.\.' has \d+ tokens; with the 18 of an image they"),
        (["red " * 76 + "red"], r"prompts\[0\] = .* has 79 tokens; with the 18 of an image they exceed .* = 96"),
        (["red " * 75 + "red"], None),
    ],
)
def test_prompts_that_leave_no_room_for_an_image_are_refused_at_once(inputs, tmp_path, prompts, said):
    recipe = yaml.safe_load((inputs / "data" / "recipe.yaml").read_text())
    recipe["samples"]["prompts"] = prompts
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    args = pretrain.parse_arguments([str(tmp_path / "recipe.yaml"), *arguments(inputs, tmp_path / "out")[1:]])
    if said is None:
        read_parts(args)
    else:
        with pytest.raises(InputError, match=f"RECIPE, samples: {said}"):
            read_parts(args)


def test_samples_at_temperature_0_are_the_likeliest(tmp_path):
    processor = tiny_processor()
    fields = SampleFields(every=1, prompts=["red", "red"], temperature=0.0, guidance_scale=2.0)
    callback = SampleCallback(fields, processor, [], MomaMetricsCallback())
    callback._write(tiny_model(processor).eval(), tmp_path, 1, seed=0)
    first, second = np.split(np.array(Image.open(tmp_path / "step-000001.png"))[4:20, 4:-4], [20], axis=1)
    assert np.array_equal(first[:, :16], second)


def test_samples_do_not_change_the_training(inputs, trained, tmp_path):
    recipe = inputs / "data" / "recipe.yaml"
    (tmp_path / "recipe.yaml").write_text(recipe.read_text().replace("every: 4", "every: 0"))
    pretrain.main([str(tmp_path / "recipe.yaml"), *arguments(inputs, tmp_path / "out")[1:]])
    mine, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", trained))
    for name, tensor in expected.items():
        assert torch.equal(mine[name], tensor), name


class KilledTraining:
    """The mixture's training in processes that are killed at random moments, and its uninterrupted twin."""

    def __init__(self, inputs, folder, num_processes):
        sizes = trainer_flags(max_steps=STEPS, eval_steps=STEPS, save_steps=1, logging_steps=1)
        self.options = [*sizes, *trainer_flags(bf16=False), "--resume"]
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text((inputs / "data" / "recipe.yaml").read_text().replace("every: 4", "every: 0"))
        self.inputs, self.num_processes, self.log = inputs, num_processes, folder / "log.txt"

    def start(self, output):
        given = [str(self.recipe), *arguments(self.inputs, output, *self.options)[1:]]
        if self.num_processes == 1:
            return [start_script(pretrain.main, given, self.log)]
        return start_scripts(pretrain.main, given, self.log, self.num_processes)

    def finish(self, output):
        for process in self.start(output):
            process.join(timeout=250)
            assert process.exitcode == 0, self.log.read_text()[-3000:]

    def finish_killed(self, output):
        moments = random.Random(1)
        for _ in range(KILLS[self.num_processes]):
            before = set(output.glob("checkpoint-*"))
            processes = self.start(output)
            while not set(output.glob("checkpoint-*")) - before:
                assert all(process.is_alive() for process in processes), self.log.read_text()[-3000:]
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.1))
            for process in processes:
                process.kill()
                process.join()
        self.finish(output)


def losses(output):
    return [entry["loss"] for entry in history(output) if "loss" in entry]


def test_killed_at_random_moments_it_ends_as_an_uninterrupted_one(inputs, tmp_path):
    whole, killed, training = tmp_path / "whole", tmp_path / "killed", KilledTraining(inputs, tmp_path, 1)
    training.finish(whole)
    training.finish_killed(killed)
    assert losses(killed) == losses(whole) and len(losses(whole)) == STEPS
    mine, expected = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    for name, tensor in expected.items():
        assert torch.equal(mine[name], tensor), name


# tests/integration/test_two_nodes.py has two processes, of which one dies
@slow
def test_two_processes_killed_at_random_moments_end_as_uninterrupted_ones(inputs, tmp_path):
    whole, killed, training = tmp_path / "whole", tmp_path / "killed", KilledTraining(inputs, tmp_path, 2)
    training.finish(whole)
    training.finish_killed(killed)
    assert len(losses(whole)) == STEPS
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-5)


def test_evaluation_reads_every_source_and_the_images_themselves(inputs, trained, tmp_path):
    options = ["--tokens", str(inputs / "tokens"), "--processor", str(inputs / "processor"), "--split", "validation"]
    evaluate(["--model", str(trained), *options, "--output", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["sources"]) == set(WEIGHTS)
    processor = tiny_processor()
    held_out = read_held_out(str(inputs / "tokens"), processor, "validation")["photos"].captioned
    pixel_values = torch.cat(list(held_out.images))
    codes = processor.vq_model.get_image_tokens(pixel_values)
    assert torch.equal(codes, held_out.codes)


def test_processor_learns_the_words_of_every_source(inputs, tmp_path):
    tiny_processor().vq_model.save_pretrained(tmp_path / "tokenizer")
    recipe = str(inputs / "data" / "recipe.yaml")
    options = ["--image-tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "out")]
    build_processor.main([recipe, *options, "--set", "processor.vocab_size=290"])
    tokenizer = type(tiny_processor()).from_pretrained(tmp_path / "out").tokenizer
    vocabulary = set(tokenizer.get_vocab())
    assert any("castle" in token for token in vocabulary) or any("apple" in token for token in vocabulary)
    assert tokenizer.padding_side == "left"


def test_a_shorter_sequence_than_that_of_the_tokens_is_refused(inputs, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = (inputs / "data" / "recipe.yaml").read_text()
    recipe.write_text(text.replace("sequence_length: 96", "sequence_length: 48"))
    with pytest.raises(ValueError, match="sequence_length = 48 is shorter than the 96"):
        pretrain.main([str(recipe), *arguments(inputs, tmp_path / "out")[1:]])


def test_source_that_was_not_tokenized_is_named(inputs, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((inputs / "data" / "recipe.yaml").read_text().replace("  photos:", "  images:"))
    with pytest.raises(ValueError, match="has no source 'images', but .*'photos'"):
        pretrain.main([str(recipe), *arguments(inputs, tmp_path / "out")[1:]])


def test_shares_are_those_of_the_weights_in_the_long_run(inputs):
    args = pretrain.parse_arguments(arguments(inputs, inputs / "none"))
    tokens = TokenFolder(args.tokens, tiny_processor())
    stream = training_stream(args.recipe.data, tokens, args.recipe.sources, 500, args.trainer["seed"])
    counts = np.zeros(3)
    for index in range(500):
        source_ids = stream[index]["source_ids"]
        counts += np.bincount(source_ids[source_ids >= 0], minlength=3)
    assert counts / counts.sum() == pytest.approx(list(WEIGHTS.values()), abs=0.005)
