# SPDX-License-Identifier: Apache-2.0
"""Images that take much to decode: pixels become fewer, scans of a JPEG and lists of a TIFF are counted."""

import math
import re
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .processor_errors_moma import InputError


# An image of more pixels, a square of some 5,800 a side, is made smaller before anything else.
MOST_PIXELS = 2**25
# No side gets shorter than this by it: image processors resize to less anyway.
LEAST_SIDE = 2048
# A scan of a few bytes passes over all pixels of a JPEG; encoders write some 10.
MOST_SCANS = 100
# Pillow makes an object of every number in a list of a TIFF's header; a strip for each row of pixels needs two lists,
# and a palette of 16 bits has 196,608 numbers.
MOST_LISTED = 2**18
# Pixels of one band: only a band at a time is converted, which bounds the memory.
_BAND_PIXELS = 2**20
# Marker of a JPEG that a segment follows, or its end; restarts and escaped bytes of pixels have none.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
# Byte order of a TIFF by its first bytes, and the types of its fields that stay bytes: BYTE, ASCII, UNDEFINED.
_TIFF_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II": "little", b"MM": "big"}
_BYTE_TYPES = (1, 2, 7)
# Modes of Pillow whose values can be averaged without a conversion.
_AVERAGED = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")


def shrink_factor(size: tuple[int, int]) -> int:
    """Return the factor by which the sides of an image are divided, 1 for most images."""
    wanted = math.ceil(math.sqrt(size[0] * size[1] / MOST_PIXELS))
    return max(1, min(wanted, min(size) // LEAST_SIDE))


def load_reduced(image: Image.Image) -> None:
    """Decode an image in place; a large JPEG to a half, a quarter or an eighth of its sides."""
    factor = shrink_factor(image.size)
    if factor > 1:
        # only JPEG is decoded at a smaller size, other formats ignore it
        image.draft(None, (image.width // factor, image.height // factor))
    image.load()


def jpeg_scans(content: bytes) -> int:
    """Count the scans of a JPEG, each of which a decoder passes over the whole image for."""
    if not content.startswith(b"\xff\xd8"):
        return 0
    scans, position = 0, 0
    while (marker := _MARKER.search(content, position)) is not None and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        # a thumbnail within a segment is no scan of the image
        position = marker.end() + max(2, int.from_bytes(content[marker.end() : marker.end() + 2], "big"))
    return scans


def tiff_listed(content: bytes) -> int:
    """Count the numbers in the lists of a TIFF's first directory, such as the places of its strips."""
    order = _TIFF_ORDERS.get(content[:2])
    if order is None or not {42, 43} & set(content[2:4]):
        return 0

    def number(position: int, size: int) -> int:
        return int.from_bytes(content[position : position + size], order)

    is_big = 43 in content[2:4]
    # bytes of an offset or a count, of the number of entries, and of an entry
    offset, head, entry = (8, 8, 20) if is_big else (4, 2, 12)
    directory = number(8 if is_big else 4, offset)
    # no more entries than the file has bytes for
    first = directory + head
    num_entries = min(number(directory, head), max(0, len(content) - first) // entry)
    places = range(first, first + num_entries * entry, entry)
    return sum(number(place + 4, offset) for place in places if number(place + 2, 2) not in _BYTE_TYPES)


def refuse_costly_files(content: bytes, name: str) -> None:
    """Raise for a JPEG that would take minutes to decode, and for a TIFF that would take seconds to open."""
    if (scans := jpeg_scans(content)) > MOST_SCANS:
        raise InputError(f"images: {name} has {scans} scans, more than {MOST_SCANS}: save the JPEG anew.")
    if (listed := tiff_listed(content)) > MOST_LISTED:
        raise InputError(
            f"images: {name} lists {listed} numbers in its header, more than {MOST_LISTED}: save the TIFF anew, in "
            "strips of several rows."
        )


def shrink_by_averaging(image: Image.Image, factor: int) -> Image.Image:
    """Divide the sides of a decoded image by averaging squares of pixels, and turn it upright."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    rows = max(1, _BAND_PIXELS // (image.width * factor)) * factor
    shrunk = None
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        band = _to_averaged_mode(band).reduce(factor)
        if shrunk is None:
            shrunk = Image.new(band.mode, (band.width, math.ceil(image.height / factor)))
        shrunk.paste(band, (0, top // factor))
    assert shrunk is not None
    shrunk.getexif()[ExifTags.Base.Orientation] = orientation
    return apply_orientation(shrunk)


def apply_orientation(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says; an image without one is returned as it is."""
    return image if image.getexif().get(ExifTags.Base.Orientation, 1) == 1 else ImageOps.exif_transpose(image)


def _to_averaged_mode(image: Image.Image) -> Image.Image:
    image = to_8_bits(image)
    if image.info.get("transparency") is not None or image.mode == "PA":
        return image.convert("RGBA")
    return image if image.mode in _AVERAGED else image.convert("L" if image.mode == "1" else "RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Bring a decoded image to an 8-bit mode: 16-bit greyscale is scaled, other modes stay.

    Colours that are multiplied by their alpha are divided by it. A transparent value of 16-bit greyscale becomes an
    alpha channel.
    """
    if image.mode == "F":
        raise InputError(
            "images: an image of mode 'F' (floating point) has no known range of values; scale it to 0..255 and "
            "convert it to mode 'L' first."
        )
    # colours with premultiplied alpha, in which Transformers sees no transparency
    if image.mode in ("La", "RGBa"):
        return image.convert(image.mode.upper())
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(
            f"images: an image of mode {image.mode!r} holds values from {values.min()} to {values.max()}, but "
            "only 16-bit greyscale (0 to 65535) is known; scale it to 8 bits first."
        )
    # 65535 / 257 is exactly 255; PIL's own conversion clips at 255, which turns most of the image white
    grey = np.round(values / 257.0).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(grey)
    # several values may have the grey of the transparent one
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([grey, alpha], axis=-1))
