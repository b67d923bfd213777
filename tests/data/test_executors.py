# SPDX-License-Identifier: Apache-2.0
"""Shards as tasks of datatrove: two workers of its local mode write what one process writes."""

import pytest

from helpers.mixture import write_mixture
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
    engine = ("--engine", "datatrove", "--tasks", "3", "--processes", "2")
    run("many", *engine)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    (tmp_path / "many" / "lines" / "train-00000-of-00001.json").unlink()
    run("many", *engine)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_what_a_task_raises_is_told(tmp_path):
    tiny_processor().save_pretrained(tmp_path / "processor")
    recipe = write_mixture(tmp_path / "data")
    (tmp_path / "data" / "lines.txt").write_text("a\n\nb\n")
    paths = ["--processor", str(tmp_path / "processor"), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="a task of datatrove failed.*'lines'.*text empty"):
        tokenize.main([str(recipe), *paths, "--engine", "datatrove", "--tasks", "2", "--processes", "2", "--strict"])


def test_slurm_needs_a_partition(capsys):
    with pytest.raises(SystemExit):
        tokenize.parse_arguments(["r", "--processor", "p", "--output", "o", "--engine", "slurm"])
    assert "--partition" in capsys.readouterr().err
