# SPDX-License-Identifier: Apache-2.0
"""Fetches Debian packages and unpacks them into a cache, without installing them."""

import argparse
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from image_sets.packages import require
from modeling_moma.utils.atomic_files import replace_folder, write_folder_aside


DEFAULT_CACHE = Path.home() / ".cache" / "modeling-moma" / "debian"


def corpus_arguments(description: str | None, folder: Path, size: str) -> argparse.Namespace:
    """The command line of a script that builds a corpus, of a package of a size."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=folder, help="folder of the data set, replaced as a whole")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help=f"folder that keeps the package ({size})")
    parser.add_argument("--archive", type=Path, help="the package's .deb file, in place of a download")
    return parser.parse_args()


class Package(NamedTuple):
    """An unpacked package: its version such as `1:3.0-39`, and the folder that stands for `/`."""

    version: str
    folder: Path


def fetch_package(name: str, cache: Path, archive: Path | None = None) -> Package:
    """
    Downloads a package with `apt-get download` and unpacks it, both into `cache`. What is there already is kept.

    `cache` keeps the archive in `NAME/` and its files in `NAME-unpacked/VERSION/`; `archive` is a `.deb` file to use
    in place of a download.
    """
    require("dpkg-deb", "dpkg")
    if archive is None:
        if not (cache / name).is_dir():
            require("apt-get", "apt")
            write_folder_aside(cache / name, lambda folder: _download(name, folder))
        # of several the newest
        archive = sorted((cache / name).glob("*.deb"))[-1]
    found, version = (_run(["dpkg-deb", "--field", str(archive), field]) for field in ("Package", "Version"))
    if found != name:
        raise ValueError(f"`archive` {str(archive)!r} is the package {found!r}: {name!r} is needed.")
    # a colon is no part of a file's name on every system
    folder = cache / f"{name}-unpacked" / re.sub(r"[^\w.+~-]", "_", version)
    if not folder.is_dir():
        replace_folder(folder, lambda aside: _run(["dpkg-deb", "--extract", str(archive), str(aside)]))
    return Package(version, folder)


def _download(name: str, folder: Path) -> None:
    folder.mkdir()
    _run(["apt-get", "--quiet", "download", name], cwd=folder)


def _run(command: list[str], cwd: Path | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if result.returncode != 0:
        error = "\n".join(result.stderr.strip().splitlines()[-3:])
        cause = "is the archive damaged, or the disk full?"
        if command[0] == "apt-get":
            cause = "is the package unknown to apt's lists (run `apt-get update` as root), or is there no network?"
        raise RuntimeError(f"`{' '.join(command)}` failed: {cause} It says:\n{error}")
    return result.stdout.strip()
