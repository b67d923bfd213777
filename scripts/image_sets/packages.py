# SPDX-License-Identifier: Apache-2.0
"""Fetches packages from npm as archives, and reads files and drawings out of them."""

import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm


ICONIFY = "@iconify/json"
EMOJI_PACKAGES = {
    "emojibase-data": "17.0.0",
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "fluentui-emoji": "1.3.0",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/fxemoji": "1.2.2",
}
ICON_PACKAGES = {
    ICONIFY: "2.2.535",
    "lucide-static": "1.62.0",
    "@tabler/icons": "3.52.0",
    "@fortawesome/fontawesome-free": "7.3.1",
    "@carbon/icons": "11.89.0",
    "@phosphor-icons/core": "2.1.1",
    "ionicons": "8.1.0",
    "@mdi/svg": "7.4.47",
    "emojibase-data": "17.0.0",
}
VERSIONS = EMOJI_PACKAGES | ICON_PACKAGES


def require(program: str, package: str) -> None:
    """Refuses to begin without a program, and names its Debian package."""
    if shutil.which(program) is None:
        raise RuntimeError(f"`{program}` is not installed. On Debian: apt-get install {package}")


def fetch_packages(cache: Path, names: Iterable[str]) -> None:
    """Downloads packages into a folder as npm's own archives. Those already there are kept."""
    require("npm", "npm")
    cache.mkdir(parents=True, exist_ok=True)
    names = list(names)

    def fetch(name: str) -> None:
        archive = archive_path(cache, name)
        if not archive.exists():
            command = ["npm", "pack", "--silent", f"{name}@{VERSIONS[name]}"]
            result = subprocess.run(command, cwd=cache, capture_output=True, text=True)
            if result.returncode != 0 or not archive.exists():
                error = "\n".join(result.stderr.strip().splitlines()[-3:])
                raise RuntimeError(f"`{' '.join(command)}` failed: no network, or no such version? npm says:\n{error}")

    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        list(tqdm(pool.map(fetch, names), total=len(names), desc="packages"))


def archive_path(cache: Path, name: str) -> Path:
    """Where `npm pack` puts a package."""
    return cache / f"{name.removeprefix('@').replace('/', '-')}-{VERSIONS[name]}.tgz"


def read_files(cache: Path, name: str, pattern: str) -> dict[str, bytes]:
    """The files of a package whose path below its top folder matches the regular expression, by path."""
    files = {}
    with tarfile.open(archive_path(cache, name), "r|gz") as members:
        for member in members:
            # most packages name their top folder `package`, a few name it after themselves
            path = member.name.partition("/")[2]
            if member.isfile() and re.fullmatch(pattern, path):
                files[path] = members.extractfile(member).read()
    if not files:
        raise ValueError(f"The package {name} has no file {pattern!r}: is its archive in {cache} damaged?")
    return files


def icon_svg(icon_set: dict, icon: dict, size: int | None = None) -> str:
    """An icon of a set in Iconify's format as an SVG document, of its own sides or fitted into a square."""
    left, top, width, height = (
        icon.get(key, icon_set.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size or width}" height="{size or height}" viewBox="{left} {top} {width} {height}">'
        f"{icon['body']}</svg>"
    )
