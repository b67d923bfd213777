# SPDX-License-Identifier: Apache-2.0
"""Fetches Debian packages and unpacks them into a cache, without installing them."""

import argparse
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from modeling_moma.utils.atomic_files import replace_folder, write_folder_aside


DEFAULT_CACHE = Path.home() / ".cache" / "modeling-moma" / "debian"


def corpus_arguments(description: str | None, card: Path, size: str, validation_share: float) -> argparse.Namespace:
    """
    The command line of a script that builds a corpus.

    Args:
        description: of the script.
        card: in whose folder the corpus lies by default.
        size: of the package, for the help.
        validation_share: by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=card.parent, help="folder of the data set, replaced as a whole")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help=f"folder that keeps the package ({size})")
    parser.add_argument("--archive", type=Path, help="the package's .deb file, in place of a download")
    parser.add_argument(
        "--validation-share", type=float, default=validation_share, help="share of all rows in validation"
    )
    return parser.parse_args()


@dataclass(frozen=True)
class Package:
    """An unpacked package: its name, its version such as `1:3.0-39`, and the folder that stands for `/`."""

    name: str
    version: str
    folder: Path


def fetch_package(name: str, cache: Path, archive: Path | None = None) -> Package:
    """
    Downloads a package with `apt-get download` and unpacks it, both into `cache`. What is there already is kept.

    Args:
        name: the package, in the version that apt offers here.
        cache: keeps the archive in `NAME/` and its files in `NAME-unpacked/VERSION/`.
        archive: a `.deb` file to use in place of a download.

    Raises:
        RuntimeError: names the missing program, or the package that apt does not know, and what to do.
        ValueError: `archive` is another package.
    """
    _require("dpkg-deb", "dpkg")
    archive = archive or _cached(name, cache) or _download(name, cache)
    found, version = (_run(["dpkg-deb", "--field", str(archive), field], name) for field in ("Package", "Version"))
    if found != name:
        raise ValueError(f"`archive` {str(archive)!r} is the package {found!r}: {name!r} is needed.")
    # a colon is no part of a file's name on every system
    folder = cache / f"{name}-unpacked" / re.sub(r"[^\w.+~-]", "_", version)
    if not folder.is_dir():
        replace_folder(folder, lambda aside: _run(["dpkg-deb", "--extract", str(archive), str(aside)], name))
    return Package(name, version, folder)


def _cached(name: str, cache: Path) -> Path | None:
    archives = sorted((cache / name).glob("*.deb"))
    if len(archives) > 1:
        names = ", ".join(path.name for path in archives)
        raise RuntimeError(f"{cache / name} holds several archives ({names}): delete all but one.")
    return archives[0] if archives else None


def _download(name: str, cache: Path) -> Path:
    _require("apt-get", "apt")

    def download(folder: Path) -> None:
        folder.mkdir()
        _run(["apt-get", "--quiet", "download", name], name, cwd=folder)

    write_folder_aside(cache / name, download)
    archive = _cached(name, cache)
    if archive is None:
        raise RuntimeError(f"`apt-get download {name}` ended without an error and left no archive in {cache / name}.")
    return archive


def _require(program: str, package: str) -> None:
    if shutil.which(program) is None:
        raise RuntimeError(
            f"`{program}` is not installed; it belongs to Debian and its relatives (package {package}). Elsewhere "
            "install dpkg, download the .deb file of the package by hand and give it as `--archive`."
        )


def _run(command: list[str], name: str, cwd: Path | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if result.returncode != 0:
        error = "\n".join(result.stderr.strip().splitlines()[-3:])
        cause = (
            f"is {name!r} unknown to apt's lists (run `apt-get update` as root), in no source of this system (it is "
            "in Debian's `main`), or is there no network?"
            if command[0] == "apt-get"
            else "is the archive damaged, or the disk full? Delete it and start again."
        )
        raise RuntimeError(f"`{' '.join(command)}` failed: {cause} It says:\n{error}")
    return result.stdout.strip()
