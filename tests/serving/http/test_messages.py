# SPDX-License-Identifier: Apache-2.0
"""Images of messages that are small as files and large as work."""

import base64
import io

import pytest
from PIL import Image

from modeling_moma.serving.http.errors import RequestError
from modeling_moma.serving.http.limits import MAX_SCANS
from modeling_moma.serving.http.messages import read_items, read_messages


FIELD = "messages[0].content[0].image_url.url"


def read(content: bytes) -> Image.Image:
    """The image of a message, as the chat template gets it."""
    part = {"type": "image_url", "image_url": {"url": "data:image/any;base64," + base64.b64encode(content).decode()}}
    read_items(read_messages([{"role": "user", "content": [part]}], "messages"), processor=None)
    return part["image_url"]


def as_file(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def repeated_scan(times: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    content = as_file(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : content.rindex(b"\xff\xd9")]
    return content[:-2] + scan * times + content[-2:]


def test_jpeg_of_many_scans_is_refused_before_it_is_decoded():
    with pytest.raises(RequestError, match=f"scans are more than {MAX_SCANS}: save") as refusal:
        read(repeated_scan(MAX_SCANS))
    assert (refusal.value.field, refusal.value.status) == (FIELD, 413)
    assert read(repeated_scan(MAX_SCANS // 2)).size == (64, 64)


def test_what_a_jpeg_brings_beside_its_pixels_is_no_scan():
    markers = b"\xff\xda" * (2 * MAX_SCANS)
    content = as_file(Image.new("RGB", (64, 64), "red"), "JPEG", comment=markers, exif=b"Exif\0\0" + markers)
    # a camera appends a film
    assert read(content + markers).size == (64, 64)
