# SPDX-License-Identifier: Apache-2.0
"""Images and sounds as data sets hold them, decoded one by one; what cannot be used is left out with a reason."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from PIL import ExifTags, Image

from tokenization.audio_input_moma import SoundError, read_sound
from tokenization.image_input_moma import clean_pil_image, open_image

from ..errors_moma import InputError


_ADDRESSES = ("http://", "https://", "data:image/")


class SkippedRow(InputError):
    """A row that cannot be trained on.

    Args:
        reason (`str`):
            of a few fixed ones, what rows are counted by.
        detail (`str`, *optional*):
            what is wrong with this one.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def read_image(value: Any, root: str | None = None, min_side: int = 1) -> tuple[Image.Image, list[str]]:
    """Decode an image.

    Args:
        value (`Any`):
            bytes, a path, an `http(s)` address, a PIL image, or what `datasets` keeps of an image that it has not
            decoded (`{"bytes": ..., "path": ...}`), whose path may lead into a zip archive or to the Hub.
        root (`str`, *optional*):
            folder that relative paths start from.
        min_side (`int`, *optional*, defaults to `1`):
            shortest side in pixels.

    Returns:
        The image in an 8-bit mode, upright, its first frame where it is animated; and what was changed for it:
        `"CMYK"`, `"16 bit"`, `"animated"`, `"EXIF-rotated"`.

    Raises:
        SkippedRow: it is missing, cannot be decoded, or is too small or too large.
    """
    try:
        image = _open(value, root)
        changes = _changes(image)
        image = clean_pil_image(image, is_own=not isinstance(value, Image.Image))
    except SkippedRow:
        raise
    except (URLError, TimeoutError, ConnectionError) as error:
        raise SkippedRow("address not reached", str(error)) from error
    # a decoder may fail in any way
    except Exception as error:
        is_bomb = isinstance(error.__cause__, Image.DecompressionBombError)
        raise SkippedRow("image too large" if is_bomb else "image damaged", str(error)) from error
    if min(image.size) < min_side:
        raise SkippedRow("image too small", f"{image.width} x {image.height} pixels")
    return image, changes


def image_file(value: Any, root: str | None = None) -> Path | None:
    """Return the file that an image is read from, `None` where the row holds it itself or its address."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (str, os.PathLike)) or not str(value) or os.fspath(value).startswith(_ADDRESSES):
        return None
    return Path(root or "", value)


def _open(value: Any, root: str | None) -> Image.Image:
    if isinstance(value, dict):
        path = value.get("path")
        value = value.get("bytes") or path
        if value is path and isinstance(path, str) and _is_of_archive(path):
            value = _from_archive(path)
    if value is None or (isinstance(value, (str, bytes)) and not value):
        raise SkippedRow("image missing", "the column is empty")
    if isinstance(value, list):
        raise SkippedRow("image damaged", f"the column holds a list, of {len(value)}: a caption has one image")
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (bytes, bytearray)):
        return open_image(bytes(value))
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    text = os.fspath(value)
    if text.startswith(_ADDRESSES):
        return open_image(text)
    path = Path(root or "", text)
    if not path.is_file():
        raise SkippedRow("image missing", _nowhere(text, root))
    if path.stat().st_size == 0:
        raise SkippedRow("image damaged", f"{str(value)!r} has no content")
    return open_image(str(path))


def _is_of_archive(path: str) -> bool:
    """Return whether `datasets` finds an image in an archive, or streams it from the Hub; a web address is neither."""
    *members, last = path.split("::")
    is_zip = bool(members) and "://" not in last
    return all(member.startswith("zip://") for member in members) and (is_zip or last.startswith("hf://"))


def _from_archive(path: str) -> bytes:
    # imported late: images alone need no data sets
    from datasets.utils.file_utils import xopen

    try:
        with xopen(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise SkippedRow("image missing", f"there is no file {path!r}") from error
    except OSError as error:
        raise SkippedRow(
            "address not reached" if "hf://" in path else "image damaged", f"{path!r}: {error}"
        ) from error


def _nowhere(path: str, root: str | None) -> str:
    """Return in words that there is no such file, and where it was looked for."""
    if root is None or Path(path).is_absolute():
        return f"there is no file {path!r}"
    is_pattern = any(letter in root for letter in "*?[") and not Path(root).is_dir()
    hint = "; `root` of the source names the folder that paths start from" if is_pattern else ""
    return f"there is no file {path!r} below {root!r}{hint}"


def _changes(image: Image.Image) -> list[str]:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    found = {
        "CMYK": image.mode == "CMYK",
        "16 bit": image.mode.startswith("I"),
        "animated": getattr(image, "n_frames", 1) > 1,
        "EXIF-rotated": orientation not in (0, 1),
    }
    return [name for name, is_so in found.items() if is_so]


@contextmanager
def refused_sounds_left_out() -> Iterator[None]:
    """Raise [`SkippedRow`] for what `tokenization` raises of a sound that it cannot use."""
    try:
        yield
    except SoundError as error:
        raise SkippedRow(error.reason, error.detail) from error


def read_row_sound(value: Any, sampling_rate: int, root: str | None = None) -> np.ndarray:
    """Return the samples `[num_samples]` of a sound as a row holds it."""
    with refused_sounds_left_out():
        return read_sound(value, sampling_rate, root)
