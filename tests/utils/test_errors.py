# SPDX-License-Identifier: Apache-2.0
"""Errors that a user reads in one line."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from modeling_moma.utils import errors
from modeling_moma.utils.errors import full_disk_line, is_input_error


ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("kind", [PermissionError, NotADirectoryError, FileExistsError])
def test_a_path_that_may_not_be_entered_is_a_users_error_and_one_without_a_name_is_not(kind):
    assert is_input_error(kind(13, "Permission denied", "some/where"))
    assert not is_input_error(kind("of a lock"))
    assert not is_input_error(FileNotFoundError(2, "No such file", "some/where"))


def test_an_output_below_a_file_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "recipe.yaml").write_text(
        f"sources: {{photos: {{data: {tmp_path / 'photos'}, image: image, text: label}}}}"
    )
    command = [sys.executable, "-m", "modeling_moma", "train-image-tokenizer", str(tmp_path / "recipe.yaml")]
    for output in ("file", "file/new"):
        found = subprocess.run(
            [*command, "--output", str(tmp_path / output)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert found.returncode == 2 and "Traceback" not in found.stderr
        assert str(tmp_path / "file") in found.stderr.splitlines()[-1]


def test_the_disk_that_is_full_is_named_though_it_is_not_the_outputs(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    error = OSError("[Errno 28] No space left on device")
    usage = shutil.disk_usage
    monkeypatch.setenv("HF_HOME", str(cache / "not there yet"))
    monkeypatch.setattr(
        errors.shutil, "disk_usage", lambda path: Usage(1, 1, 0) if Path(path) == cache else usage(path)
    )
    assert f"0.0 MiB are free at {str(cache)!r}." in full_disk_line(error, "tokenize", str(tmp_path / "tokens"))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    line = full_disk_line(error, "tokenize", str(tmp_path / "tokens"))
    assert f"are free at {str(tmp_path)!r} ([Errno 28]" in line
