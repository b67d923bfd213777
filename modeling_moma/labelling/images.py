# SPDX-License-Identifier: Apache-2.0
"""The images of a folder, one by one; what is none, or cannot be read, comes with the reason in its place."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..data.images import SkippedRow, read_image
from ..errors_moma import InputError


# larger files are no icons, and reading one takes as much memory
LARGEST_FILE = 64 << 20
SVG_ENDINGS = (".svg", ".svgz")
# pixels of the longer side of a rendered SVG, which the processor scales to its own
SVG_SIDE = 256
# after which a file is given up
SVG_SECONDS = 20.0


def folder_files(
    folder: str | Path, option: str = "FOLDER", tell: Callable[[str, str], object] = lambda path, why: None
) -> list[Path]:
    """Return the files under a folder, sorted, without hidden ones; `tell` is called of each subfolder left out."""
    root = Path(folder)
    # no text at all, as of a variable that is not set, would be the working directory
    is_named = bool(os.fspath(folder))
    if not is_named or not root.is_dir():
        what = "is a file" if is_named and root.exists() else "does not exist"
        raise InputError(f"{option} {str(folder)!r} {what}: name a folder of images.")

    def skip(error: OSError):
        if error.filename == os.fspath(root):
            raise InputError(f"{option} {str(folder)!r} cannot be read: {error.strerror}.") from error
        tell(error.filename, f"folder not read: {error.strerror}")

    found = []
    for parent, folders, files in os.walk(root, onerror=skip):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            # a path may be too long to be asked about, which `Path.is_symlink` raises
            if os.path.islink(link := os.path.join(parent, name)):
                tell(link, "a link to a folder")
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    if not found:
        raise InputError(f"{option} {str(folder)!r} holds no files (hidden ones and links to folders are not read).")
    return sorted(found)


def read_files(files: list[Path]) -> Iterator[tuple[Path, Image.Image | SkippedRow]]:
    """Yield each file with its image, or with the reason why there is none."""
    with closing(SvgRenderer()) as renderer:
        for file in files:
            # of large images and odd metadata, among lines that name files
            with warnings.catch_warnings(action="ignore"):
                try:
                    found = _read(file, renderer)
                except SkippedRow as error:
                    found = error
            yield file, found


def _read(file: Path, renderer: "SvgRenderer") -> Image.Image:
    try:
        if not file.is_file():
            raise SkippedRow("no file", "neither a file nor a link to one")
        if (size := file.stat().st_size) > LARGEST_FILE:
            raise SkippedRow("file too large", f"{size >> 20} MiB, and at most {LARGEST_FILE >> 20} are read")
        is_svg = file.suffix.lower() in SVG_ENDINGS
        return read_image(renderer.render(file) if is_svg else str(file.absolute()))[0]
    except SkippedRow as error:
        if error.__cause__ is not None and isinstance(error.__cause__.__cause__, UnidentifiedImageError):
            raise SkippedRow("no image", "or one of another kind than those that are read, or damaged") from error
        raise
    except OSError as error:
        raise SkippedRow("file not read", error.strerror or str(error)) from error


class SvgRenderer:
    """Renders SVG files in a process of its own, which a hostile file may end and which is then started anew."""

    def __init__(self):
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, file: Path, seconds: float = SVG_SECONDS) -> bytes:
        """Return a PNG on white, of `SVG_SIDE` pixels along its longer side."""
        if importlib.util.find_spec("resvg_py") is None:
            raise SkippedRow("no SVG renderer", 'install it with `pip install "modeling-moma[icons]"`')
        if self._process is None:
            # isolated, so that no module of the current folder takes a name
            command = [sys.executable, "-I", str(Path(__file__).with_name("render_svg.py")), str(SVG_SIDE)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(str(file.absolute())).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            image = process.stdout.read(answer["size"])
        # the process is gone, with or without a part of its answer
        except (OSError, ValueError) as error:
            self.close()
            ended = "ends the renderer: it is nested too deeply or too large"
            why = ended if timer.is_alive() else "takes too long"
            raise SkippedRow("SVG not rendered", f"it {why}") from error
        finally:
            timer.cancel()
        if not image:
            raise SkippedRow("SVG not rendered", answer["error"])
        return image

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
