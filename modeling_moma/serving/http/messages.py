# SPDX-License-Identifier: Apache-2.0
"""Checks of messages, their images and their sounds: nothing is let through that is not known here."""

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from tokenization.audio_codecs_moma import AUDIO
from tokenization.audio_input_moma import SoundError, read_sound
from tokenization.large_images_moma import MOST_SCANS, jpeg_scans

from .errors import RequestError, short, short_name
from .limits import (
    MAX_IMAGES,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_PIXELS,
    MAX_PIXELS_TOGETHER,
    MAX_SAMPLES,
    MAX_SIDE,
    MAX_SOUNDS,
    MAX_WEB_IMAGES,
)


ROLES = ("user", "assistant", "system")
MESSAGE = ("role", "content", "name", "type", "id", "status")
TEXT_KINDS, IMAGE_KINDS, SOUND_KIND = (
    ("text", "input_text", "output_text"),
    ("image_url", "input_image"),
    "input_audio",
)
TEXT, IMAGE, SOUND = ("type", "text"), ("type", "image_url", "detail"), ("type", "input_audio")
# these formats Pillow decodes by itself and people send; its decoders for rare ones are little tested, and TIFF may
# list millions of strips, each of which takes time and memory when the header is read; AVIF may hold an image of any
# size, which is scaled to that of its header once it is decoded
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SOUND_FORMATS = ("wav", "mp3", "flac", "ogg")


class MessageImage:
    """An image of a message.

    Args:
        part (`dict[str, Any]`):
            of the message, with `image_url` as an object with `url` or as an address itself.
        place (`str`):
            of the part in the body.

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

    modality = "image"

    @property
    def is_of_the_web(self) -> bool:
        """Whether it has to be downloaded."""
        return self.address.lower().startswith(("http://", "https://"))

    def read(self) -> Image.Image:
        """Open it, which reads its header alone.

        Raises:
            RequestError: an address that is neither of the web nor base64, no image, or a JPEG of too many scans.
        """
        content = _decode(self.address, self.field) if self.content is None else self.content
        if (scans := jpeg_scans(content)) > MOST_SCANS:
            raise RequestError(self.field, f"{scans} scans are more than {MOST_SCANS}: save the JPEG anew.", 413)
        try:
            return Image.open(io.BytesIO(content), formats=_formats())
        except Image.DecompressionBombError as error:
            raise RequestError(self.field, f"the image is too large ({error}).", 413) from error
        # decoders raise any error for damaged images
        except Exception as error:
            known = ", ".join(FORMATS)
            raise RequestError(self.field, f"it is damaged, or none of {known} ({_reason(error)}).") from error

    def forget(self) -> None:
        """Let go of the image, which the model's inputs hold from now on."""
        self.part["image_url"], self.address, self.content = None, "", None


class MessageSound:
    """A sound of a message.

    Args:
        part (`dict[str, Any]`):
            of the message, with `input_audio`, an object with `data`, which is base64, and `format`.
        place (`str`):
            of the part in the body.

    Raises:
        RequestError: there are no data, or the format is none of [`SOUND_FORMATS`].
    """

    modality, is_of_the_web = AUDIO, False

    def __init__(self, part: dict[str, Any], place: str):
        self.part, self.field = part, f"{place}.input_audio"
        holder = part.get("input_audio")
        if not isinstance(holder, dict) or not isinstance(holder.get("data"), str) or not holder["data"]:
            raise RequestError(self.field, "there must be an object with `data`, a file of sound as base64.")
        _check_known(holder, ("data", "format"), self.field)
        if holder.get("format") not in (None, *SOUND_FORMATS):
            known = ", ".join(SOUND_FORMATS)
            raise RequestError(f"{self.field}.format", f"{short(holder['format'])} must be one of {known}.")
        self.data: str = holder["data"]

    def read(self, processor: Any) -> Any:
        """Decode it at the rate of the processor's codec.

        Args:
            processor (`Any`):
                of the model.

        Raises:
            RequestError: the processor has no codec of sounds, or this is no base64 or no sound.
        """
        rate = getattr(processor.codecs.get(AUDIO) if hasattr(processor, "codecs") else None, "sampling_rate", None)
        if rate is None:
            raise RequestError(f"{self.field}.data", "the model hears nothing: it has no codec of sounds.")
        try:
            content = base64.b64decode("".join(self.data.split()), validate=True)
            return read_sound(content, rate, max_samples=MAX_SAMPLES)
        except (binascii.Error, UnicodeError) as error:
            raise RequestError(f"{self.field}.data", f"it is no base64 ({error}).") from error
        except SoundError as error:
            status = 413 if error.reason in ("sound too long", "sound too large") else 400
            raise RequestError(f"{self.field}.data", f"{error}.", status) from error

    def forget(self) -> None:
        """Let go of the sound, likewise."""
        self.part["input_audio"], self.data = None, ""


def read_messages(messages: Any, field: str) -> list[MessageImage | MessageSound]:
    """Check the messages of a request.

    Args:
        messages (`Any`):
            the body's list of messages.
        field (`str`):
            its name.

    Returns:
        `list[MessageImage | MessageSound]`: their images and sounds, not opened yet.

    Raises:
        RequestError: no list of messages, too many of them or of their images or sounds, another role, or a part of a
            kind that the model cannot read.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError(field, f"{short(messages)} must be a list of at least one message.")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(field, f"these are {len(messages)} messages, more than {MAX_MESSAGES}.")
    items: list[MessageImage | MessageSound] = []
    for number, message in enumerate(messages):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise RequestError(place, f"{short(message)} must be an object with `role` and `content`.")
        if message.get("role") not in ROLES:
            raise RequestError(f"{place}.role", f"{short(message.get('role'))} must be one of {', '.join(ROLES)}.")
        # Transformers' server silently skips an entry of any other type
        if message.get("type") not in (None, "", "message"):
            raise RequestError(f"{place}.type", f"{short(message['type'])} must be 'message', or left out.")
        _check_known(message, MESSAGE, place)
        for name in ("name", "id", "status"):
            if not isinstance(message.get(name), str | None):
                raise RequestError(f"{place}.{name}", f"{short(message[name])} must be a text.")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise RequestError(f"{place}.content", f"{short(content)} must be a text or a list of parts.")
        if len(content) > MAX_PARTS:
            raise RequestError(f"{place}.content", f"these are {len(content)} parts, more than {MAX_PARTS}.")
        for index, part in enumerate(content):
            kind = _kind_of_item(part, f"{place}.content[{index}]")
            if kind is not None:
                items.append(kind(part, f"{place}.content[{index}]"))
    for most, kind, counted in (
        (MAX_IMAGES, "images", [item for item in items if item.modality == "image"]),
        (MAX_WEB_IMAGES, "images of the web", [item for item in items if item.is_of_the_web]),
        (MAX_SOUNDS, "sounds", [item for item in items if item.modality == AUDIO]),
    ):
        if len(counted) > most:
            raise RequestError(counted[most].field, f"these are more than {most} {kind}.")
    return items


def read_items(items: Sequence[MessageImage | MessageSound], processor: Any):
    """Decode the images and sounds of a request, and put them into its messages.

    Args:
        items (`Sequence[MessageImage | MessageSound]`):
            those that [`read_messages`] found.
        processor (`Any`):
            of the model.

    Raises:
        RequestError: one of them cannot be decoded, or too many pixels or samples (status 413).
    """
    _read_images([item for item in items if isinstance(item, MessageImage)])
    for item in items:
        if isinstance(item, MessageSound):
            # Transformers' server would have an address read, but takes samples as they are
            item.part["input_audio"] = item.read(processor)


def _read_images(images: Sequence[MessageImage]):
    opened = [image.read() for image in images]
    together = 0
    for image, decoded in zip(images, opened):
        pixels = decoded.width * decoded.height
        together += pixels
        if max(decoded.size) > MAX_SIDE:
            what = f"a side of {max(decoded.size):,} pixels is longer than {MAX_SIDE:,}"
            raise RequestError(image.field, f"{what}: scale it down.", 413)
        if pixels > MAX_PIXELS:
            what = f"{decoded.width} x {decoded.height} pixels are more than {MAX_PIXELS:,}"
            raise RequestError(image.field, f"{what}: scale it down.", 413)
        if together > MAX_PIXELS_TOGETHER:
            what = f"with those before it, it has more than {MAX_PIXELS_TOGETHER:,} pixels"
            raise RequestError(image.field, f"{what}: scale them down.", 413)
    for image, decoded in zip(images, opened):
        try:
            decoded.load()
        except Exception as error:
            raise RequestError(image.field, f"it is truncated, damaged or no image ({_reason(error)}).") from error
        # Transformers' server would open an address again, or a file, but takes an image as it is
        image.part["image_url"] = decoded


def _kind_of_item(part: Any, place: str) -> type[MessageImage] | type[MessageSound] | None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_KINDS:
        _check_known(part, TEXT, place)
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{place}.text", f"{short(part.get('text'))} must be a text.")
        return None
    if kind == SOUND_KIND:
        _check_known(part, SOUND, place)
        return MessageSound
    if kind not in IMAGE_KINDS:
        raise RequestError(
            f"{place}.type",
            f"{short(kind)} must be 'text', 'image_url' or 'input_audio': the model reads nothing else.",
        )
    _check_known(part, IMAGE, place)
    if isinstance(part.get("image_url"), dict):
        _check_known(part["image_url"], ("url", "detail"), f"{place}.image_url")
    return MessageImage


def _check_known(given: dict[str, Any], known: tuple[str, ...], place: str):
    """Raise for further fields that are not empty: clients send back what they got, with empty fields in it."""
    for name, value in given.items():
        if name not in known and value:
            raise RequestError(f"{place}.{short_name(name)}", "this server reads no such field.", 422)


def _decode(address: str, field: str) -> bytes:
    # Transformers' server would open any other text as a file of this machine
    head, comma, encoded = address.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise RequestError(field, f"{address[:40]!r} must begin with `data:image/png;base64,`.")
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(field, f"it is no base64 ({error}).") from error


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _reason(error: Exception) -> str:
    return str(error).split(" <")[0]
