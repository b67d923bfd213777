# SPDX-License-Identifier: Apache-2.0
"""Packages are unpacked without being installed, and what is missing is named."""

import shutil
import subprocess

import pytest

from corpora_recipe.debian import fetch_package


needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


@pytest.fixture
def archive(tmp_path):
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    control = "Package: words\nVersion: 1:2.0-3\nArchitecture: all\nMaintainer: a <a@b.org>\nDescription: words\n"
    (root / "DEBIAN/control").write_text(control)
    (root / "words.txt").write_text("apple")
    path = tmp_path / "words.deb"
    subprocess.run(["dpkg-deb", "--build", str(root), str(path)], check=True, capture_output=True)
    return path


@needs_dpkg
def test_archive_is_unpacked_once(archive, tmp_path):
    package = fetch_package("words", tmp_path / "cache", archive)
    assert package.version == "1:2.0-3" and (package.folder / "words.txt").read_text() == "apple"
    (package.folder / "words.txt").write_text("kept")
    assert (fetch_package("words", tmp_path / "cache", archive).folder / "words.txt").read_text() == "kept"


@needs_dpkg
def test_archive_in_the_cache_needs_no_network(archive, tmp_path):
    (tmp_path / "cache/words").mkdir(parents=True)
    shutil.copy(archive, tmp_path / "cache/words/words_2.deb")
    assert (fetch_package("words", tmp_path / "cache").folder / "words.txt").exists()


@needs_dpkg
def test_other_and_broken_archives_are_refused(archive, tmp_path):
    with pytest.raises(ValueError, match="'words': 'sounds' is needed"):
        fetch_package("sounds", tmp_path / "cache", archive)
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(RuntimeError, match="damaged"):
        fetch_package("words", tmp_path / "cache", archive)
    assert not list((tmp_path / "cache").rglob("words.txt"))


def program(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_unknown_package_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    program(tmp_path / "bin", "dpkg-deb", "exit 0")
    program(tmp_path / "bin", "apt-get", "echo 'E: Unable to locate package words' >&2; exit 100")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(
        RuntimeError, match="(?s)download words. failed.*apt-get update.*Unable to locate package words"
    ):
        fetch_package("words", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
