# SPDX-License-Identifier: Apache-2.0
"""Shards as tasks of datatrove: two workers of its local mode write what one process writes."""

import shutil

import pytest

from helpers.mixture import write_mixture
from helpers.slow import slow
from helpers.tiny import tiny_processor
from modeling_moma.cli import tokenize


pytest.importorskip("datatrove", reason="the extra `scale` is not installed")


def contents(folder):
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and "datatrove" not in path.parts]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def test_two_workers_write_what_one_process_writes(tmp_path):
    tiny_processor().save_pretrained(tmp_path / "processor")
    recipe = write_mixture(tmp_path / "data")

    def run(output, *options):
        paths = ["--processor", str(tmp_path / "processor"), "--output", str(tmp_path / output)]
        tokenize.main([str(recipe), *paths, *options])

    run("one", "--processes", "1")
    # a start that was killed has left two shards, one without the report that makes it count
    for name in ("photos", "lines"):
        shutil.copytree(tmp_path / "one" / name, tmp_path / "many" / name)
    shutil.copy2(tmp_path / "one" / "job.json", tmp_path / "many")
    (tmp_path / "many" / "lines" / "train-00000-of-00001.json").unlink()
    kept = {path: path.stat().st_ino for path in (tmp_path / "many" / "photos").iterdir()}
    run("many", "--engine", "datatrove", "--tasks", "3", "--processes", "2")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert kept == {path: path.stat().st_ino for path in kept}


# one worker is this process; from others what is raised comes through a pool
@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=slow)])
def test_what_a_task_raises_is_told(tmp_path, processes):
    tiny_processor().save_pretrained(tmp_path / "processor")
    recipe = write_mixture(tmp_path / "data")
    (tmp_path / "data" / "lines.txt").write_text("a\n\nb\n")
    paths = ["--processor", str(tmp_path / "processor"), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="a task of datatrove failed.*'lines'.*text empty"):
        options = ["--engine", "datatrove", "--tasks", "2", "--processes", processes, "--strict"]
        tokenize.main([str(recipe), *paths, *options])


def test_slurm_needs_a_partition(capsys):
    with pytest.raises(SystemExit):
        tokenize.parse_arguments(["r", "--processor", "p", "--output", "o", "--engine", "slurm"])
    assert "--partition" in capsys.readouterr().err
