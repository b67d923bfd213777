# SPDX-License-Identifier: Apache-2.0
"""Fields and images of requests: what is read, and what is refused by its name."""

import base64
import io

import pytest
from PIL import Image

from helpers.scans import repeated_scan
from tokenization.image_input_moma import MOST_SCANS


for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason="the extra `serve` is missing")

from fastapi.exceptions import RequestValidationError  # noqa: E402
from pydantic import ValidationError  # noqa: E402

from modeling_moma.serving.http.requests import (  # noqa: E402
    MAX_ITEMS,
    MAX_PIXELS,
    MAX_SIDE,
    ChatRequest,
    RequestError,
    refusal_of,
)


FIELD = "messages[0].content[0].image_url.url"
WORDS = [{"role": "user", "content": "a"}]


def part(content: bytes) -> dict:
    address = "data:image/any;base64," + base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": address, "detail": "low"}}


def read(*contents: bytes) -> list[Image.Image]:
    """The images of a message, as the chat template gets them."""
    message = {"role": "user", "content": [part(content) for content in contents]}
    (turn,) = ChatRequest(messages=[message]).read(processor=None)
    return [shown["image"] for shown in turn["content"]]


def as_file(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_jpeg_of_many_scans_is_refused_before_it_is_decoded():
    with pytest.raises(RequestError, match=f"scans are more than {MOST_SCANS}: save") as refusal:
        read(repeated_scan(MOST_SCANS))
    assert (refusal.value.field, refusal.value.status) == (FIELD, 413)
    assert read(repeated_scan(MOST_SCANS // 2))[0].size == (64, 64)


def test_what_a_jpeg_brings_beside_its_pixels_is_no_scan():
    markers = b"\xff\xda" * (2 * MOST_SCANS)
    content = as_file(Image.new("RGB", (64, 64), "red"), "JPEG", comment=markers, exif=b"Exif\0\0" + markers)
    # a camera appends a film
    assert read(content + markers)[0].size == (64, 64)


@pytest.mark.parametrize("size", [(1, MAX_SIDE + 1), (MAX_SIDE + 1, 1), (MAX_PIXELS // 4096 + 1, 4096)])
def test_image_of_a_long_side_or_of_many_pixels_is_refused(size):
    with pytest.raises(RequestError, match=f"{size[0]} x {size[1]} pixels are too many") as refusal:
        read(as_file(Image.new("1", size), "PNG"))
    assert (refusal.value.field, refusal.value.status) == (FIELD, 413)
    assert read(as_file(Image.new("1", (1, MAX_SIDE)), "PNG"))[0].size == (1, MAX_SIDE)


def test_images_are_counted_together():
    whole = as_file(Image.new("1", (4096, 4096)), "PNG")
    with pytest.raises(RequestError, match="pixels are too many") as refusal:
        read(*[whole] * 5)
    assert (refusal.value.field, refusal.value.status) == (FIELD.replace("content[0]", "content[4]"), 413)
    with pytest.raises(RequestError, match="these are more than 16 images"):
        read(*[as_file(Image.new("1", (4, 4)), "PNG")] * (MAX_ITEMS + 1))


def test_tiff_is_refused_and_the_formats_that_are_read_are_named():
    with pytest.raises(RequestError, match="none of PNG, JPEG, WEBP, GIF, BMP ") as refusal:
        read(as_file(Image.new("L", (4, 4)), "TIFF"))
    assert (refusal.value.field, refusal.value.status) == (FIELD, 400)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "MPO"])
def test_images_of_usual_formats_are_read(kind):
    assert read(as_file(Image.new("RGB", (4, 4), "red"), kind))[0].size == (4, 4)


def refused(**fields) -> RequestError:
    with pytest.raises(ValidationError) as errors:
        ChatRequest(**{"messages": WORDS, **fields})
    return refusal_of(RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in errors.value.errors()]))


@pytest.mark.parametrize(
    ("fields", "place", "status"),
    [
        ({"colour": "red"}, "colour", 422),
        ({"messages": None}, "messages", 400),
        ({"messages": [{"content": "a"}]}, "messages[0].role", 400),
        ({"messages": [{**WORDS[0], "chat_template": "a"}]}, "messages[0].chat_template", 422),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, FIELD.removesuffix(".url"), 400),
        (
            {"messages": [{"role": "user", "content": [{**part(b""), "path": "/etc"}]}]},
            "messages[0].content[0].path",
            422,
        ),
        ({"temperature": -1}, "temperature", 400),
        ({"temperature": 1e-310}, "temperature", 400),
        ({"temperature": float("nan")}, "temperature", 400),
        ({"max_tokens": 0}, "max_tokens", 400),
        ({"max_tokens": True}, "max_tokens", 400),
        ({"stop": [""]}, "stop[0]", 400),
        ({"n": 2}, "n", 400),
        ({"logprobs": True}, "logprobs", 422),
        ({"response_format": {"type": "json_object"}}, "response_format", 422),
    ],
    ids=str,
)
def test_fields_are_refused_by_their_place(fields, place, status):
    error = refused(**fields)
    assert (error.field, error.status) == (place, status), error


def test_what_a_client_sent_is_shown_shortly_and_no_object_is():
    assert len(str(refused(temperature="a" * 10**6))) < 200
    assert "secret" not in str(refused(top_p={"secret": 1}))


@pytest.mark.parametrize(
    "fields",
    [
        {str(number): 1 for number in range(9999)},
        {"logit_bias": {f"a{number}": 1 for number in range(9999)}},
        {"messages": [{"role": "user", "content": [1] * 60}] * 200},
        {"messages": [{**WORDS[0], **{str(number): 1 for number in range(99)}}] * 99},
    ],
)
def test_many_faults_are_not_all_told_which_would_take_seconds(fields):
    with pytest.raises(ValidationError) as errors:
        ChatRequest(**{"messages": WORDS, **fields})
    assert errors.value.error_count() == 1


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"temperature": 0, "top_p": 0.5, "repetition_penalty": 2}, {"do_sample": False, "repetition_penalty": 2.0}),
        ({"temperature": 2}, {"do_sample": True, "temperature": 2.0}),
        ({"top_k": 5}, {"do_sample": True, "top_k": 5}),
        ({"logit_bias": {"7": -1}, "response_format": {"type": "text"}}, {"sequence_bias": {(7,): -1.0}}),
    ],
)
def test_fields_become_options_of_generate(fields, options):
    assert ChatRequest(messages=WORDS, **fields).sampling() == options
