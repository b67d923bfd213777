# SPDX-License-Identifier: Apache-2.0
"""Checks of the pictures of a request, which may come from anybody."""

import base64
import binascii
import io
import warnings
from collections.abc import Sequence
from typing import Any

from PIL import Image

from .errors import RequestError
from .limits import MAX_PICTURES, MAX_PIXELS, MAX_PIXELS_TOGETHER


# what Pillow decodes by itself and people send; its decoders for rare formats are little tried
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


class Picture:
    """A picture of a message.

    Args:
        part: of the message, with `image_url` as an object with `url` or as an address itself.
        place: of the part in the body.

    Raises:
        RequestError: there is no address.
    """

    def __init__(self, part: dict[str, Any], place: str):
        self.part = part
        holder = part.get("image_url")
        address = holder.get("url") if isinstance(holder, dict) else holder
        self.field = f"{place}.image_url.url" if isinstance(holder, dict) else f"{place}.image_url"
        if not isinstance(address, str) or not address:
            raise RequestError(self.field, "there must be an address: `data:image/png;base64,...`, or of the web.")
        self.address = address
        self.content: bytes | None = None

    @property
    def is_of_the_web(self) -> bool:
        return self.address.lower().startswith(("http://", "https://"))

    def read(self) -> Image.Image:
        """
        Opens it, which reads its header alone.

        Raises:
            RequestError: an address that is neither of the web nor base64, or no picture.
        """
        content = _decode(self.address, self.field) if self.content is None else self.content
        try:
            return _open(content)
        except Image.DecompressionBombError as error:
            raise RequestError(self.field, f"the picture is too large ({error}).", 413) from error
        # decoders raise whatever they come across in damaged pictures
        except Exception as error:
            raise RequestError(self.field, f"it is damaged, or no picture ({_reason(error)}).") from error


def read_pictures(pictures: Sequence[Picture]):
    """
    Decodes the pictures of a request, and puts them into its messages.

    Raises:
        RequestError: too many of them, one that cannot be decoded, or too many pixels
            (status 413).
    """
    if len(pictures) > MAX_PICTURES:
        raise RequestError(pictures[MAX_PICTURES].field, f"these are more than {MAX_PICTURES} pictures.")
    opened = [picture.read() for picture in pictures]
    together = 0
    for picture, image in zip(pictures, opened):
        pixels = image.width * image.height
        together += pixels
        if pixels > MAX_PIXELS:
            what = f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}"
            raise RequestError(picture.field, f"{what}: scale it down.", 413)
        if together > MAX_PIXELS_TOGETHER:
            what = f"with those before it, it has more than {MAX_PIXELS_TOGETHER:,} pixels"
            raise RequestError(picture.field, f"{what}: scale them down.", 413)
    for picture, image in zip(pictures, opened):
        try:
            image.load()
        except Exception as error:
            raise RequestError(picture.field, f"it is truncated, damaged or no picture ({_reason(error)}).") from error
        # the server reads addresses a second time, and files too, but takes a picture as it is
        picture.part["image_url"] = image


def _decode(address: str, field: str) -> bytes:
    # the server would open any other text as a file of its own
    head, comma, encoded = address.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise RequestError(field, f"{address[:40]!r} must begin with `data:image/png;base64,`.")
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(field, f"it is no base64 ({error}).") from error


def _open(content: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # our own bound is lower
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(content), formats=_formats())


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _reason(error: Exception) -> str:
    return str(error).split(" <")[0]
