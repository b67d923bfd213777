# SPDX-License-Identifier: Apache-2.0
"""`moma pretrain`, `generate` and `evaluate`, each in a process that has the device, against one that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.cuda.launch import GUARD
from helpers.tiny import TRAINED, trainer_flags, write_training


SIZES = trainer_flags(
    max_steps=4, per_device_train_batch_size=4, eval_steps=4, save_steps=2, logging_steps=1, warmup_steps=1, bf16=False
)
RECIPE = {
    "model": TRAINED,
    "data": {"packed": True, "sequence_length": 64},
    "samples": {"every": 2, "prompts": ["noto: red"], "images": 1},
}
# of a process: how fast it is, where its files are, and what the machine holds
OWN = ("runtime", "per_second", "seconds", "output", "flos", "memory", "tokens", "throughput", "wait")


def moma(on_device: bool, folder: Path, *arguments) -> dict:
    """Runs a command to its end, and tells what it asked of the device."""
    counts = folder / "counts.json"
    start = ["-m", "helpers.cuda.command", counts] if on_device else ["-m", "modeling_moma"]
    environment = os.environ if on_device else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, (*start, *arguments))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(counts.read_text()) if on_device else {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two trainings, on the device and on the CPU, and what they learn from."""
    folder = tmp_path_factory.mktemp("commands")
    write_training(folder)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    inputs = [f"--processor={folder / 'processor'}", f"--tokens={folder / 'tokens'}"]
    for on_device, name in ((True, "device"), (False, "cpu")):
        moma(on_device, folder, "pretrain", folder / "recipe.json", *inputs, f"--output={folder / name}", *SIZES)
    return folder


def logs(folder):
    """What a training logged, but how fast."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in log.items() if not any(name in key for name in OWN)} for log in history]


def near(found, expected):
    """Whether figures of any structure are the same."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(near(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(near, found, expected))
    return found == (pytest.approx(expected, rel=1e-3, abs=1e-4) if isinstance(expected, float) else expected)


def test_pretrain_leaves_the_weights_of_the_cpu(runs):
    found, expected = (load_file(runs / name / "model.safetensors") for name in ("device", "cpu"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_pretrain_logs_the_figures_that_it_logs_on_the_cpu(runs):
    found, expected = logs(runs / "device"), logs(runs / "cpu")
    assert [sorted(log) for log in found] == [sorted(log) for log in expected]


def test_pretrain_logs_the_numbers_that_it_logs_on_the_cpu(runs):
    for found, expected in zip(logs(runs / "device"), logs(runs / "cpu"), strict=True):
        common = found.keys() & expected.keys()
        assert any("loss" in key for key in common)
        assert near({key: found[key] for key in common}, {key: expected[key] for key in common})


def test_pretrain_goes_on_from_a_checkpoint(runs, tmp_path):
    inputs = [f"--processor={runs / 'processor'}", f"--tokens={runs / 'tokens'}", f"--output={tmp_path / 'run'}"]
    call = ["pretrain", runs / "recipe.json", *inputs, *SIZES]
    moma(True, tmp_path, *call, "--stop-at", "2")
    moma(True, tmp_path, *call, "--resume")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", runs / "device"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_generate_draws_and_writes_what_it_does_on_the_cpu(runs, tmp_path):
    pixels = []
    for on_device, name in ((True, "device"), (False, "cpu")):
        call = ["--model", runs / "cpu", "--prompt", "noto: red apple", "--prompt", "castle", "--seed", "1"]
        draw = ["--mode", "image", "--set", "sampling.guidance_scale=2", "--output", tmp_path / f"{name}.png"]
        counts = moma(on_device, tmp_path, "generate", *call, *draw)
        pixels.append([Image.open(tmp_path / f"{name}-{index}.png").tobytes() for index in range(2)])
        assert not on_device or GUARD not in os.environ or counts["launches"] > 1000
    assert pixels[0] == pixels[1] or GUARD not in os.environ


def test_evaluate_measures_what_it_does_on_the_cpu(runs, tmp_path):
    figures = []
    for on_device, name in ((True, "device"), (False, "cpu")):
        call = ["--model", runs / "cpu", "--tokens", runs / "tokens", "--split", "validation", "--batch-size", "2"]
        measures = ["--measures", "losses", "retrieval", "--output", tmp_path / f"{name}.json"]
        moma(on_device, tmp_path, "evaluate", *call, *measures)
        sources = json.loads((tmp_path / f"{name}.json").read_text())["sources"]
        figures.append(
            {source: {key: found[key] for key in found if key != "seconds"} for source, found in sources.items()}
        )
    assert near(*figures)
