# SPDX-License-Identifier: Apache-2.0
"""Images of any kind, as files, texts, arrays and objects, read with 8 bits a channel; large ones made smaller."""

import base64
import binascii
import errno
import math
import os
import re
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import is_pil_image, is_valid_image
from transformers.utils import logging

from .processor_errors_moma import InputError


logger = logging.get_logger(__name__)

_URL_TIMEOUT_SECONDS = 60
# Formats that Pillow decodes itself, in memory; for others it starts programs, such as Ghostscript for EPS.
_FORMATS = frozenset("AVIF BMP DIB GIF ICNS ICO JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP".split())
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


def open_image(source: str | bytes) -> Image.Image:
    """Open an image from bytes, a path, an `http(s)://` address, a `data:image/...` address or a base64 string.

    Unlike `transformers.image_utils.load_image` the mode of the file is kept, so that transparency and 16-bit values
    reach the image processor.
    """
    name, subject, is_file = repr(source[:200]), "the file", False
    if isinstance(source, bytes):
        data, name = source, f"{len(source):,} bytes"
    elif is_file := os.path.isfile(source):
        data = Path(source).read_bytes()
    elif source.startswith(("http://", "https://")):
        data = _fetch(source)
    else:
        data, subject = _decode_base64(source), "no such file exists, and as base64 it"
    if (scans := jpeg_scans(data)) > MOST_SCANS:
        raise InputError(f"images: {name} has {scans} scans, more than {MOST_SCANS}: save the JPEG anew.")
    if (listed := tiff_listed(data)) > MOST_LISTED:
        raise InputError(
            f"images: {name} lists {listed} numbers in its header, more than {MOST_LISTED}: save the TIFF anew, in "
            "strips of several rows."
        )
    Image.init()
    try:
        image = Image.open(BytesIO(data), formats=tuple(_FORMATS.intersection(Image.OPEN)))
    # decoders raise errors of any type
    except Exception as error:
        # of a file that Pillow does not know it says no more than where its bytes lie in memory
        detail = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        is_large = isinstance(error, Image.DecompressionBombError)
        why = "too large" if is_large else "truncated, damaged or of another kind"
        raise InputError(f"images: {name} cannot be opened as an image: {subject} is {why}{detail}.") from error
    if is_file:
        # errors name the file by this attribute
        image.filename = source
    return image


def _fetch(address: str) -> bytes:
    try:
        with urlopen(address, timeout=_URL_TIMEOUT_SECONDS) as response:
            return response.read()
    # a server that closes the connection raises an error of both kinds
    except OSError as error:
        # which of several addresses it is, the error does not say
        kind = URLError if isinstance(error, URLError) else type(error)
        raise kind(f"{address[:200]!r} cannot be fetched: {error}") from error
    except (HTTPException, ValueError) as error:
        raise InputError(
            f"images: {address[:200]!r} cannot be fetched ({error!r}): it is malformed, or its server broke off."
        ) from error


def _decode_base64(source: str) -> bytes:
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    # encoders break lines, and use either alphabet with or without padding
    encoded = "".join(encoded.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"images: {source[:200]!r} is neither an existing file, an http(s) address, a data:image address "
            "nor a base64 string."
        ) from error


def holds_items(value: Any) -> bool:
    """Return whether a value is a list of items or, as a column of a data set, read like one; no item itself."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def iter_image_sources(images: Any) -> Iterator:
    """Yield the images of a nested list one by one, without opening any."""
    if isinstance(images, (str, os.PathLike)) or is_pil_image(images):
        yield images
    elif holds_items(images):
        for entry in images:
            yield from iter_image_sources(entry)
    elif is_valid_image(images):
        if images.ndim > 3:
            yield from (image for entry in images for image in iter_image_sources(entry))
        else:
            yield images
    else:
        raise TypeError(
            "images: expected PIL images, arrays, tensors, paths or addresses (or lists of them), got "
            f"{type(images).__name__}."
        )


def clean_pil_image(image: Image.Image, is_own: bool = False) -> Image.Image:
    """Decode a PIL image, turn it upright (EXIF orientation) and scale 16-bit greyscale to 8 bits.

    An image of more than 33 million pixels becomes smaller, so that it does not take gigabytes of memory: a JPEG that
    nobody else holds is decoded to a half, a quarter or an eighth of its sides, of others squares of pixels are
    averaged. Neither side gets shorter than 2,048 pixels by that.
    """
    try:
        if is_own and (factor := shrink_factor(image.size)) > 1:
            # only JPEG is decoded at a smaller size, other formats ignore it
            image.draft(None, (image.width // factor, image.height // factor))
        image.load()
        factor = shrink_factor(image.size)
        if factor == 1:
            image = apply_orientation(image)
    # decoders raise errors of any type
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        name = getattr(image, "filename", "") or "an image from memory"
        raise InputError(f"images: {name} cannot be decoded, the file is truncated or damaged ({error}).") from error
    if 0 in image.size:
        raise InputError(f"images: got an empty image of size {image.size}.")
    return to_8_bits(image) if factor == 1 else shrink_by_averaging(image, factor)


def clean_array_image(image: "np.ndarray | torch.Tensor", do_rescale: bool | None) -> "np.ndarray | torch.Tensor":
    """Bring an image given as an array to 8-bit integers, or to 32-bit floats where no rescaling follows."""
    if 0 in image.shape:
        raise InputError(f"images: got an empty image of shape {tuple(image.shape)}.")
    if isinstance(image, torch.Tensor):
        if image.dtype == torch.uint8:
            # elsewhere it would be resized by another filter, and get other codes
            return image.cpu()
        tensor = image.detach().cpu()
        # NumPy has no bfloat16
        values = tensor.numpy() if not tensor.is_floating_point() else tensor.float().numpy()
    else:
        values = image
    if values.dtype.kind not in "biuf":
        raise InputError(f"images: an image of type {values.dtype} holds no real numbers, so these cannot be colours.")
    is_float = np.issubdtype(values.dtype, np.floating)
    if is_float and not np.isfinite(values).all():
        raise InputError("images: an image holds NaN or infinite values.")
    if is_float and not do_rescale:
        return values.astype(np.float32)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    # of either byte order
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return np.round(values / 257.0).astype(np.uint8)
    if values.min() < 0 or values.max() > 255:
        raise InputError(
            f"images: an image of type {values.dtype} holds values from {values.min()} to {values.max()}; expected 0 "
            "to 255, or the type uint16 for 16-bit values."
        )
    if is_float and values.max() <= 1.0:
        logger.warning_once(
            "An image of floating point values from 0 to 1 is about to be divided by 255. Pass values from 0 to "
            "255, or `do_rescale=False`."
        )
    # resizing rounds and clips only 8-bit values
    return np.round(values).astype(np.uint8)


def shrink_factor(size: tuple[int, int]) -> int:
    """Return the factor by which the sides of an image are divided, 1 for most images."""
    wanted = math.ceil(math.sqrt(size[0] * size[1] / MOST_PIXELS))
    return max(1, min(wanted, min(size) // LEAST_SIDE))


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
