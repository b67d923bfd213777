# SPDX-License-Identifier: Apache-2.0
"""Fetches packages from npm as archives, and reads files out of them."""

import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def require_npm() -> None:
    """Raises `RuntimeError` that names the Debian package if `npm` is missing here."""
    if shutil.which("npm") is None:
        raise RuntimeError("`npm` is not installed. On Debian: apt-get install npm")


def fetch_packages(cache: Path, versions: dict[str, str], on_done: Callable[[str], None] = lambda name: None) -> None:
    """
    Downloads packages into `cache` as npm's own archives, in parallel. Archives already there are kept.

    Args:
        cache: the folder of the archives, made where missing.
        versions: the version of each package, by name.
        on_done: called with the name of each package that is there.
    """
    cache.mkdir(parents=True, exist_ok=True)

    def fetch(name):
        archive = archive_path(cache, name, versions[name])
        if not archive.exists():
            command = ["npm", "pack", "--silent", f"{name}@{versions[name]}"]
            result = subprocess.run(command, cwd=cache, capture_output=True, text=True)
            if result.returncode != 0 or not archive.exists():
                error = "\n".join(result.stderr.strip().splitlines()[-3:])
                raise RuntimeError(f"`{' '.join(command)}` failed: no network, or no such version? npm says:\n{error}")
        on_done(name)

    with ThreadPoolExecutor(max_workers=len(versions)) as pool:
        list(pool.map(fetch, versions))


def archive_path(cache: Path, name: str, version: str) -> Path:
    """Returns where `npm pack` puts the package `name`."""
    return cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def read_files(archive: Path, pattern: str) -> dict[str, bytes]:
    """Returns the files of a package whose path below `package/` matches the regular expression, keyed by path."""
    files = {}
    with tarfile.open(archive, "r|gz") as members:
        for member in members:
            # most packages name their top folder `package`, a few name it after themselves
            path = member.name.partition("/")[2]
            if member.isfile() and re.fullmatch(pattern, path):
                files[path] = members.extractfile(member).read()
    if not files:
        raise ValueError(f"The package {archive.name} has no file {pattern!r}: is its archive damaged?")
    return files
