# SPDX-License-Identifier: Apache-2.0
"""What a request may say, and its reading: fields, messages, images and sounds. What is not named here is an error."""

import base64
import io
from collections import Counter
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tokenization.audio_codecs_moma import AUDIO
from tokenization.audio_input_moma import SoundError, read_sound
from tokenization.image_input_moma import MOST_SCANS, jpeg_scans

from ...errors_moma import InputError
from ...utils.messages import one_line


MAX_MESSAGES, MAX_PARTS, MAX_ITEMS, MAX_DRAWINGS = 256, 64, 16, 10
# pixels of an image, of all images of a request, and along a side: reading 2**24 pixels takes 50 MB
MAX_PIXELS, MAX_PIXELS_TOGETHER, MAX_SIDE = 2**24, 2**26, 2**14
# samples of a sound: reading 2**22 takes 16 MB
MAX_SAMPLES = 2**22
MAX_STOPS, MAX_STOP_LETTERS, MAX_BIASES = 4, 64, 1024
# what Pillow decodes by itself and people send; not TIFF, which may list millions of strips, nor AVIF, which holds an
# image of any size behind a small header
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
RETRY_SECONDS = "5"
# fields of OpenAI's that change no answer, and values of others that ask for what this server does anyway
UNREAD = {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls"}
UNREAD |= {"name", "detail"}
USUAL = {"response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "none"}


class RequestError(InputError):
    """A field of a request cannot be answered, by a status of HTTP from 400 to 499."""

    def __init__(self, field: str, reason: str, status: int = 400):
        # half a surrogate pair cannot be encoded as UTF-8, so it is shown by its escape
        self.field = field[:120].encode(errors="backslashreplace").decode()
        super().__init__(f"{self.field}: {reason}".encode(errors="backslashreplace").decode())
        self.status = status

    def response(self, **headers: str) -> JSONResponse:
        """Return the answer, in OpenAI's form of errors."""
        extra = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": RETRY_SECONDS}}.get(self.status, {})
        error = {"message": str(self), "type": "invalid_request_error", "param": self.field, "code": None}
        return JSONResponse({"error": error}, self.status, {**extra, **headers})


def refusal_of(errors: RequestValidationError) -> RequestError:
    """Return the first of pydantic's errors; of the body's own it says nothing that the client sent."""
    error = errors.errors()[0]
    kind, place, given = error["type"], error["loc"][1:], error.get("input")
    if kind == "json_invalid":
        return RequestError("body", f"it is no JSON: {error['ctx']['error']}, at character {place[0]}.")
    if not place:
        what = "there is none: send a JSON object"
        if kind != "missing":
            what = "it must be a JSON object, sent with `Content-Type: application/json`"
        return RequestError("body", f"{what}.")
    # pydantic puts the kind of a message's part, which no request has as a field, behind its number
    names = place[:4] + place[5:] if place[2:3] == ("content",) else place
    field = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).removeprefix(".")
    if kind == "extra_forbidden":
        return RequestError(field, "this server reads no such field.", 422)
    shown = f"{str(given)[:60]!r}: " if isinstance(given, str | int | float) else ""
    return RequestError(field, f"{shown}{error['msg'].removeprefix('Value error, ')}.")


def _zero_or_warm(value: float) -> float:
    # logits divided by a smaller temperature could overflow
    if 0 < value < 1e-3:
        raise InputError("it must be 0, or at least 0.001")
    return value


def _few(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise InputError(f"{len(biases)} biases are more than {MAX_BIASES}")
    return biases


Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=-(2**63) + 1, lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LETTERS)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class _Fields(BaseModel):
    """An object of a request, in which null counts as left out, as does an unknown field that says nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _said(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        said = {name: value for name, value in given.items() if name in cls.model_fields and value is not None}
        for name, value in given.items():
            if name not in cls.model_fields and value and name not in UNREAD and value != USUAL.get(name):
                # one is enough: pydantic takes its time over each error
                return {**said, name: value}
        return said


class _Address(_Fields):
    url: str


class _Sound(_Fields):
    data: str
    format: Literal["wav", "mp3", "flac", "ogg"] | None = None


class TextPart(_Fields):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImagePart(_Fields):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: _Address


class SoundPart(_Fields):
    """A sound of a message."""

    type: Literal["input_audio"]
    input_audio: _Sound


Part = Annotated[TextPart | ImagePart | SoundPart, Field(discriminator="type")]
AsList = BeforeValidator(lambda given: [given] if isinstance(given, str) else given)
AsParts = BeforeValidator(lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given)


class _Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True), AsParts] = []


class _StreamOptions(_Fields):
    include_usage: bool = False


class ChatRequest(_Fields):
    """`/v1/chat/completions`; `top_k` and `repetition_penalty` have the names of Transformers."""

    model: str | None = None
    messages: Annotated[list[_Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_zero_or_warm)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**20)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], BeforeValidator(_few)] = {}
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), AsList] = []
    seed: Seed | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()

    @property
    def letters(self) -> int:
        """Letters of all messages."""
        parts = [part for message in self.messages for part in message.content]
        return sum(len(part.text) for part in parts if isinstance(part, TextPart))

    def sampling(self) -> dict[str, Any]:
        """Return arguments of `generate`; what the request does not say is as the model has it."""
        chosen = self.model_dump(include={"temperature", "top_p", "top_k"}, exclude_none=True)
        given: dict[str, Any] = {**chosen, "do_sample": True} if chosen else {}
        if self.temperature == 0:
            given = {"do_sample": False}
        if self.repetition_penalty is not None:
            given["repetition_penalty"] = self.repetition_penalty
        if self.logit_bias:
            given["sequence_bias"] = {(int(token),): bias for token, bias in self.logit_bias.items()}
        return given

    def read(self, processor: Any) -> list[dict[str, Any]]:
        """Return the messages as a chat template takes them, images and sounds decoded."""
        kinds = Counter(part.type for message in self.messages for part in message.content)
        for kind, what in (("image_url", "images"), ("input_audio", "sounds")):
            if kinds[kind] > MAX_ITEMS:
                raise RequestError("messages", f"these are more than {MAX_ITEMS} {what}.")
        chat, pixels = [], 0
        for number, message in enumerate(self.messages):
            content = []
            for index, part in enumerate(message.content):
                place = f"messages[{number}].content[{index}].{part.type}"
                if isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                elif isinstance(part, ImagePart):
                    image = _read_image(part.image_url.url, f"{place}.url", MAX_PIXELS_TOGETHER - pixels)
                    pixels += image.width * image.height
                    content.append({"type": "image", "image": image})
                else:
                    content.append({"type": AUDIO, AUDIO: _read_sound(part.input_audio.data, place, processor)})
            role = "system" if message.role == "developer" else message.role
            chat.append({"role": role, "content": content})
        return chat


class ImageRequest(_Fields):
    """`/v1/images/generations`."""

    model: str | None = None
    prompt: Annotated[str, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=MAX_DRAWINGS)] = 1
    seed: Seed | None = None
    size: str | None = None
    response_format: Literal["b64_json"] = "b64_json"


def _read_image(address: str, field: str, pixels_left: int) -> Image.Image:
    head, comma, encoded = address.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise RequestError(field, f"{address[:40]!r} must begin with `data:image/png;base64,`: nothing is fetched.")
    content = _decoded(encoded, field)
    if (scans := jpeg_scans(content)) > MOST_SCANS:
        raise RequestError(field, f"{scans} scans are more than {MOST_SCANS}: save the JPEG anew.", 413)
    Image.init()
    try:
        image = Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])
        # Pillow has read only the header, so that large images are refused before they are decoded
        pixels = image.width * image.height
        is_large = max(image.size) > MAX_SIDE or pixels > min(MAX_PIXELS, pixels_left)
        if not is_large:
            image.load()
    # decoders raise all kinds of errors for damaged images; what stands behind " <" is the repr of a Python object
    except Exception as error:
        reason = f"it is damaged, or none of {', '.join(FORMATS)} ({one_line(error).split(' <')[0]})."
        status = 413 if isinstance(error, Image.DecompressionBombError) else 400
        raise RequestError(field, reason, status) from error
    if is_large:
        bounds = f"a side has at most {MAX_SIDE:,}, an image {MAX_PIXELS:,}, all of them {MAX_PIXELS_TOGETHER:,}"
        raise RequestError(field, f"{image.width} x {image.height} pixels are too many ({bounds}).", 413)
    return image


def _read_sound(data: str, field: str, processor: Any) -> Any:
    rate = getattr(processor.codecs.get(AUDIO), "sampling_rate", None)
    if rate is None:
        raise RequestError(field, "the model hears nothing: it has no codec of sounds.")
    try:
        return read_sound(_decoded(data, f"{field}.data"), rate, max_samples=MAX_SAMPLES)
    except SoundError as error:
        is_large = error.reason in ("sound too long", "sound too large")
        raise RequestError(f"{field}.data", f"{error}.", 413 if is_large else 400) from error


def _decoded(encoded: str, field: str) -> bytes:
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError as error:
        raise RequestError(field, f"it is no base64 ({error}).") from error
