# SPDX-License-Identifier: Apache-2.0
"""Checks of the pictures of a request, which may come from anybody."""

import base64
import binascii
import io
import warnings
from typing import Any

import httpx
from PIL import Image

from .errors import RequestError


# a picture is scaled down to the model's few pixels anyway; one of so many takes 50 MB while it is read
MAX_PIXELS = 2**24
MAX_DOWNLOAD_BYTES = 16 << 20
DOWNLOAD_SECONDS = 10.0


def check_picture(part: dict[str, Any], place: str):
    """Read a picture whole, and put one from the web into the part, so that it is fetched once.

    Args:
        part: of a message, with `image_url` as an object with `url` or as an address itself.
        place: of the part in the body.

    Raises:
        RequestError: no address, one that is neither of the web nor base64, a picture that cannot be read, or one of
            more than `MAX_PIXELS` (status 413).
    """
    holder = part.get("image_url")
    if isinstance(holder, dict):
        field, address = f"{place}.image_url.url", holder.get("url")
    else:
        field, address = f"{place}.image_url", holder
    if not isinstance(address, str) or not address:
        raise RequestError(field, "there must be an address: `data:image/png;base64,...`, or of the web.")
    if address.startswith(("http://", "https://")):
        content = _download(address, field)
        address = "data:image/unknown;base64," + base64.b64encode(content).decode()
        if isinstance(holder, dict):
            holder["url"] = address
        else:
            part["image_url"] = address
    else:
        content = _decode(address, field)
    _check_readable(content, field)


def _decode(address: str, field: str) -> bytes:
    # the server would open any other text as a file of its own
    head, comma, encoded = address.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise RequestError(field, f"{address[:40]!r} must begin with `data:image/png;base64,` or with `https://`.")
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(field, f"it is no base64 ({error}).") from error


def _download(address: str, field: str) -> bytes:
    content = bytearray()
    try:
        with httpx.stream("GET", address, timeout=DOWNLOAD_SECONDS, follow_redirects=True) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_DOWNLOAD_BYTES:
                    raise RequestError(field, f"it has more than {MAX_DOWNLOAD_BYTES >> 20} MiB.", 413)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RequestError(field, f"{address[:80]!r} cannot be fetched ({error}).") from error
    return bytes(content)


def _check_readable(content: bytes, field: str):
    with warnings.catch_warnings():
        # the bound below is lower
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            # reads the header alone
            picture = Image.open(io.BytesIO(content))
            width, height = picture.size
            if width * height <= MAX_PIXELS:
                picture.load()
        except Image.DecompressionBombError as error:
            raise RequestError(field, f"the picture is too large ({error}).", 413) from error
        # decoders raise whatever they come across in damaged pictures
        except Exception as error:
            reason = str(error).split(" <")[0]
            raise RequestError(field, f"it is truncated, damaged or no picture ({reason}).") from error
    if width * height > MAX_PIXELS:
        raise RequestError(field, f"{width} x {height} pixels are more than {MAX_PIXELS:,}: scale it down.", 413)
