# SPDX-License-Identifier: Apache-2.0
"""Shards as tasks of datatrove: two workers of its local mode write what one process writes."""

import shutil

import pytest

from helpers.mixture import write_mixture
from helpers.tiny import tiny_processor
from modeling_moma.cli import tokenize
from modeling_moma.data.tokenizing import TokenizeStep


executor = pytest.importorskip("datatrove.executor", reason="the extra `scale` is not installed")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_workers_write_what_one_process_writes(tmp_path):
    tiny_processor().save_pretrained(tmp_path / "processor")
    recipe = write_mixture(tmp_path / "data")

    def run(output, *options):
        paths = ["--processor", str(tmp_path / "processor"), "--output", str(tmp_path / output)]
        tokenize.main([str(recipe), *paths, *options])

    run("one", "--processes", "1")
    run("many", "--plan")
    assert not (tmp_path / "many" / "manifest.json").exists()
    # a start that was killed has left two shards, one without the report that makes it count
    for name in ("photos", "lines"):
        shutil.copytree(tmp_path / "one" / name, tmp_path / "many" / name)
    (tmp_path / "many" / "lines" / "train-00000-of-00001.json").unlink()
    kept = {path: path.stat().st_ino for path in (tmp_path / "many" / "photos").iterdir()}
    step = TokenizeStep(str(tmp_path / "many"))
    shared = {"tasks": 3, "workers": 2, "start_method": "spawn"}
    executor.LocalPipelineExecutor([step], logging_dir=str(tmp_path / "logs"), **shared).run()
    run("many")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert kept == {path: path.stat().st_ino for path in kept}
