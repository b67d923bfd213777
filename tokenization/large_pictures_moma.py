# SPDX-License-Identifier: Apache-2.0
"""Pictures of many millions of pixels: decoded small where the format can, averaged in bands where it cannot."""

import math

import numpy as np
from PIL import Image, ImageOps

from .processor_errors_moma import InputError


# pixels above which a picture is made smaller before anything else, a square of some 5,800 a side
MOST_PIXELS = 2**25
# no side gets shorter than this many pixels by it: what an image processor makes of the rest is smaller still
LEAST_SIDE = 2048
# pixels of a band, all that is ever converted at once
_BAND_PIXELS = 2**20
_EXIF_ORIENTATION = 0x0112
# modes whose values can be averaged as they are
_AVERAGED = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")


def shrink_factor(size: tuple[int, int]) -> int:
    """By how much the sides of a picture `(width, height)` are divided, 1 for most."""
    wanted = math.ceil(math.sqrt(size[0] * size[1] / MOST_PIXELS))
    return max(1, min(wanted, min(size) // LEAST_SIDE))


def load_small(image: Image.Image) -> None:
    """Decode a picture in place; a large JPEG to a half, a quarter or an eighth of its sides."""
    factor = shrink_factor(image.size)
    if factor > 1:
        # other formats take no notice
        image.draft(None, (image.width // factor, image.height // factor))
    image.load()


def shrunk_upright(image: Image.Image, factor: int) -> Image.Image:
    """
    A decoded picture with its sides divided by `factor` (means of squares), in an 8-bit mode, and upright.

    Raises:
        ValueError: its values have no known range.
    """
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    rows = max(1, _BAND_PIXELS // (image.width * factor)) * factor
    shrunk = None
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        band = _averaged_mode(band).reduce(factor)
        if shrunk is None:
            shrunk = Image.new(band.mode, (band.width, math.ceil(image.height / factor)))
        shrunk.paste(band, (0, top // factor))
    assert shrunk is not None
    shrunk.getexif()[_EXIF_ORIENTATION] = orientation
    return upright(shrunk)


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF orientation says, itself where that is none."""
    return image if image.getexif().get(_EXIF_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)


def _averaged_mode(image: Image.Image) -> Image.Image:
    image = to_8_bits(image)
    if image.info.get("transparency") is not None or image.mode == "PA":
        return image.convert("RGBA")
    return image if image.mode in _AVERAGED else image.convert("L" if image.mode == "1" else "RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """
    A decoded picture in an 8-bit mode, 16-bit greyscale scaled.

    Raises:
        ValueError: its values have no known range (mode `F`, or mode `I` outside 0 to 65535).
    """
    if image.mode == "F":
        raise InputError(
            "images: a picture of mode 'F' (floating point) has no known range of values; scale it to 0..255 and "
            "convert it to mode 'L' first."
        )
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(
            f"images: a picture of mode {image.mode!r} holds values from {values.min()} to {values.max()}, but "
            "only 16-bit greyscale (0 to 65535) is known; scale it to 8 bits first."
        )
    # 257 maps 65535 to 255 exactly; PIL's own conversion clips at 255 and turns most of the picture white
    return Image.fromarray(np.round(values / 257.0).astype(np.uint8))


__all__ = ["LEAST_SIDE", "MOST_PIXELS", "load_small", "shrink_factor", "shrunk_upright", "to_8_bits", "upright"]
