# SPDX-License-Identifier: Apache-2.0
"""The scripts that reproduce a result start commands whose recipes and scripts exist."""

import re
import subprocess
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def start(script, folder, **environment):
    """Starts a script in a folder with a Python that says what it is asked for, and does nothing."""
    copied = folder / "scripts" / script.name
    copied.parent.mkdir(exist_ok=True)
    copied.write_text(script.read_text())
    python = folder / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    return subprocess.run(
        ["bash", str(copied)], cwd=folder, env={"PYTHON": str(python), **environment}, capture_output=True, text=True
    )


def test_what_it_starts_exists(tmp_path):
    (tmp_path / "data" / "icons" / "data").mkdir(parents=True)
    (tmp_path / "data" / "icons" / "data" / "train-00000-of-00005.parquet").touch()
    started = start(ROOT / "scripts" / "reproduce_icons.sh", tmp_path)
    assert started.returncode == 0, started.stderr
    named = set(re.findall(r"(?:recipes|scripts)/[\w.-]+", started.stdout))
    assert named, started.stdout
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    assert re.search("pretrain", started.stdout) and "--write-card" in started.stdout


def test_icons_that_are_not_built_are_asked_for(tmp_path):
    started = start(ROOT / "scripts" / "reproduce_icons.sh", tmp_path)
    assert started.returncode == 1 and "make data" in started.stderr and not started.stdout


def test_finished_stages_are_not_begun_again(tmp_path):
    for name in ("data/icons/data/train-00000-of-00005.parquet", "runs/icons/tokenizer/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    started = start(ROOT / "scripts" / "reproduce_icons.sh", tmp_path)
    assert "train-image-tokenizer" not in started.stdout and "build-processor" in started.stdout
    assert re.findall(r"--model (\S+) .*--output (\S+) .*trainer.seed=(\d)", started.stdout) == [
        ("runs/icons/model", "runs/icons/model-typical", "1")
    ]
    assert "build_typical_icons.py --model runs/icons/model --output runs/icons/typical" in started.stdout
    assert "--tokens runs/icons/tokens-typical --output runs/icons/model-typical" in started.stdout
    assert "--never-first tags --draw-temperature 0.3 --output model_cards/moma-icons" in started.stdout


def test_short_trainings_take_every_stage_and_leave_what_is_released_alone(tmp_path):
    train = tmp_path / "data" / "icons" / "data" / "train-00000-of-00005.parquet"
    train.parent.mkdir(parents=True)
    train.touch()
    (tmp_path / "recipes").mkdir()
    for recipe in (ROOT / "recipes").glob("moma-icons*.yaml"):
        (tmp_path / "recipes" / recipe.name).write_text(recipe.read_text())
    whole, short = (start(ROOT / "scripts" / "reproduce_icons.sh", tmp_path, **more) for more in ({}, {"STEPS": "20"}))
    calls, shortened = whole.stdout.splitlines(), short.stdout.splitlines()
    assert short.returncode == 0 and len(shortened) == len(calls), short.stderr
    trains = re.compile("train-image-tokenizer|pretrain")
    are_short = [bool(re.search(r"steps=20\b", call)) for call in shortened]
    assert are_short == [bool(trains.search(call)) for call in calls]
    assert not re.search(r"model_cards|runs/icons/|[^-]recipes/moma", short.stdout.replace("icons-short/recipes", ""))
    typical = (tmp_path / "runs" / "icons-short" / "recipes" / "moma-icons-typical.yaml").read_text()
    assert "data: runs/icons-short/typical\n" in typical and "data: data/icons\n" in typical
