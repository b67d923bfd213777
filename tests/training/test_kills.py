# SPDX-License-Identifier: Apache-2.0
"""Scripts killed at random moments: a second start goes on, and ends where an uninterrupted run ends."""

import json
import random
import time

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file

from helpers.processes import start_script
from helpers.slow import RUN_SLOW
from helpers.tiny import noise_images, trainer_flags, write_training
from modeling_moma.cli import pretrain, tokenize
from modeling_moma.training.checkpoints import last_checkpoint


KILLS, STEPS, TOKENIZER_KILLS = (20, 120, 10) if RUN_SLOW else (4, 32, 5)
# steps that a run gets on after it has begun its first checkpoint; so many kills must not see the last one
LONGEST_WAIT = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_training(folder)
    return folder


def finish(process):
    process.join(timeout=200)
    return process.exitcode


def pretrain_arguments(inputs, output):
    paths = {"--processor": inputs / "processor", "--tokens": inputs / "tokens"}
    sizes = {"max_steps": STEPS, "eval_steps": STEPS, "per_device_train_batch_size": 2, "save_steps": 1}
    return [
        str(inputs / "recipe.json"),
        *[str(text) for pair in {**paths, "--output": output}.items() for text in pair],
        *trainer_flags(**sizes, warmup_steps=2, logging_steps=1),
        "--resume",
    ]


def test_pre_training_killed_at_random_moments_ends_as_an_uninterrupted_one(inputs, tmp_path):
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log.txt"
    assert finish(start_script(pretrain.main, pretrain_arguments(inputs, whole), log)) == 0, log.read_text()
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    (seconds_a_step,) = (entry["train_runtime"] / STEPS for entry in history if "train_runtime" in entry)
    moments = random.Random(0)
    torn = 0
    for _ in range(KILLS):
        before = set(killed.glob("checkpoint-*"))
        process = start_script(pretrain.main, pretrain_arguments(inputs, killed), log)
        while not set(killed.glob("checkpoint-*")) - before:
            assert process.is_alive(), log.read_text()[-3000:]
            time.sleep(0.002)
        time.sleep(moments.uniform(0, LONGEST_WAIT) * seconds_a_step)
        assert process.is_alive(), "the training is too short for so many kills"
        process.kill()
        process.join()
        newest = max(killed.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        torn += str(newest) != last_checkpoint(killed)
    assert finish(start_script(pretrain.main, pretrain_arguments(inputs, killed), log)) == 0, log.read_text()[-3000:]
    print(f"{torn} of {KILLS} kills tore a checkpoint")
    mine, expected = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(mine[name], tensor), name
    losses = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (killed, whole)]
    mine, expected = ([log["loss"] for log in history if "loss" in log] for history in losses)
    assert mine == expected


@pytest.mark.parametrize("text", [None, "", '{"epoch": 1, "global_s'], ids=["missing", "empty", "half"])
def test_checkpoint_whose_state_cannot_be_read_is_passed_over(tmp_path, text, caplog):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-best").mkdir()
    state = tmp_path / "checkpoint-100" / "trainer_state.json"
    state.unlink()
    if text is not None:
        state.write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-100 is not whole" in caplog.text
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_tokenization_killed_at_random_moments_ends_as_an_uninterrupted_one(inputs, tmp_path):
    log = tmp_path / "log.txt"
    rows = {"image": noise_images(600), "label": [f"thing {index}" for index in range(600)]}
    features = Features({"image": Image(), "label": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    source = {"data": str(tmp_path / "train.parquet"), "image": "image", "text": "label", "codings": 2}
    (tmp_path / "recipe.json").write_text(json.dumps({"sources": {"things": source}}))

    def start(output):
        arguments = [str(tmp_path / "recipe.json"), "--processor", str(inputs / "processor"), "--output", str(output)]
        return start_script(tokenize.main, [*arguments, "--rows-per-shard", "128", "--processes", "1"], log)

    def contents(output):
        return {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}

    began = time.time()
    assert finish(start(tmp_path / "whole")) == 0, log.read_text()
    duration = time.time() - began
    moments, unfinished = random.Random(0), 0
    for number in range(TOKENIZER_KILLS):
        process = start(tmp_path / "killed")
        time.sleep(moments.uniform(0, duration * (number + 1) / TOKENIZER_KILLS))
        unfinished += process.is_alive()
        process.kill()
        process.join()
        for path in (tmp_path / "killed").rglob("*.json"):
            json.loads(path.read_text())
    assert unfinished > 2
    assert finish(start(tmp_path / "killed")) == 0, log.read_text()
    whole, killed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert {path: content for path, content in killed.items() if ".partial" not in path.name} == whole
