# SPDX-License-Identifier: Apache-2.0
"""Images of messages that are small as files and large as work."""

import base64
import io

import pytest
from PIL import Image

from helpers.scans import repeated_scan
from modeling_moma.serving.http.errors import RequestError
from modeling_moma.serving.http.limits import MAX_SIDE
from modeling_moma.serving.http.messages import read_items, read_messages
from tokenization.large_images_moma import MOST_SCANS


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


def test_jpeg_of_many_scans_is_refused_before_it_is_decoded():
    with pytest.raises(RequestError, match=f"scans are more than {MOST_SCANS}: save") as refusal:
        read(repeated_scan(MOST_SCANS))
    assert (refusal.value.field, refusal.value.status) == (FIELD, 413)
    assert read(repeated_scan(MOST_SCANS // 2)).size == (64, 64)


def test_what_a_jpeg_brings_beside_its_pixels_is_no_scan():
    markers = b"\xff\xda" * (2 * MOST_SCANS)
    content = as_file(Image.new("RGB", (64, 64), "red"), "JPEG", comment=markers, exif=b"Exif\0\0" + markers)
    # a camera appends a film
    assert read(content + markers).size == (64, 64)


@pytest.mark.parametrize("size", [(1, MAX_SIDE + 1), (MAX_SIDE + 1, 1)])
def test_image_of_a_long_side_is_refused(size):
    with pytest.raises(RequestError, match="a side of 16,385 pixels is longer than 16,384") as refusal:
        read(as_file(Image.new("L", size), "PNG"))
    assert (refusal.value.field, refusal.value.status) == (FIELD, 413)
    assert read(as_file(Image.new("L", (1, MAX_SIDE)), "PNG")).size == (1, MAX_SIDE)


def test_tiff_is_refused_and_the_formats_that_are_read_are_named():
    with pytest.raises(RequestError, match="none of PNG, JPEG, WEBP, GIF, BMP ") as refusal:
        read(as_file(Image.new("L", (4, 4)), "TIFF"))
    assert (refusal.value.field, refusal.value.status) == (FIELD, 400)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "MPO"])
def test_images_of_usual_formats_are_read(kind):
    assert read(as_file(Image.new("RGB", (4, 4), "red"), kind)).size == (4, 4)
