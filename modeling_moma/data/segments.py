# SPDX-License-Identifier: Apache-2.0
"""Interleaved documents as rows hold them: lists of segments, or the messages of a chat with their pictures."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenization import MomaProcessor

from .kinds import InterleavedKind, Kind, TextKind
from .pictures import LeftOut


@dataclass(frozen=True)
class PictureSegment:
    """A picture in a document, as the row holds it: bytes, path, address or what `datasets` keeps of one."""

    value: Any


def read_segments(kind: InterleavedKind, row: dict[str, Any]) -> list[str | PictureSegment]:
    """
    The texts and pictures of a row in their order.

    Args:
        kind: names the column `segments`.
        row: with that column, a list whose entries are texts, `{"text": ...}`, `{"image": ...}` or `{"type": "text",
            "text": ...}`.

    Raises:
        LeftOut: the column holds something else, or nothing.
    """
    return [part for part in map(_read_segment, row[str(kind.segments)] or []) if part != ""]


def _read_segment(entry: Any) -> str | PictureSegment:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, dict):
        # rows of one table have all columns, those that do not apply as None
        text, image = entry.get("text"), entry.get("image")
        if image is not None and entry.get("type", "image") in ("image", None):
            return PictureSegment(image)
        if isinstance(text, str) and entry.get("type", "text") in ("text", None):
            return text
    raise LeftOut(
        "segment unknown", f"{str(entry)[:100]!r} is neither a text nor {{'text': ...}} nor {{'image': ...}}"
    )


def row_pictures(kind: Kind, row: dict[str, Any]) -> list[Any]:
    """
    The pictures of a row, undecoded.

    Args:
        kind: of the row's source.
        row: its columns.
    """
    if isinstance(kind, TextKind):
        return []
    if not isinstance(kind, InterleavedKind):
        return [row[kind.image]]
    if kind.segments is not None:
        parts = row[kind.segments]
    elif kind.images is not None:
        images = row[kind.images]
        return images if isinstance(images, list) else [] if images is None else [images]
    else:
        messages = row[kind.messages] or []  # pyright: ignore[reportArgumentType]
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        parts = [part for content in contents if isinstance(content, list) for part in content]
    parts = parts if isinstance(parts, list) else []
    return [part["image"] for part in parts if isinstance(part, dict) and part.get("image") is not None]


def text_length(value: Any) -> int:
    """Characters of all texts in a row, or in a part of one, but for pictures and where they lie."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(text_length(part) for name, part in value.items() if name not in ("image", "path", "url", "bytes"))
    return sum(map(text_length, value)) if isinstance(value, (list, tuple)) else 0


def read_messages(kind: InterleavedKind, row: dict[str, Any], processor: MomaProcessor) -> tuple[str, list[Any]]:
    """
    A chat in the form of the processor's template, and its pictures in order.

    Args:
        kind: names the columns `messages` and perhaps `images`.
        row: with these. Messages have `role` and `content`, a text (in which `<image>` stands for the next picture) or
            a list of `{"type": "text", "text": ...}` and `{"type": "image"}`; TRL's format.
        processor: gives the template.

    Returns:
        The text, special tokens in messages marked as plain text, and a value for each `<image>` in it.

    Raises:
        LeftOut: messages are malformed, or pictures and placeholders are of different number.
    """
    listed = list(row[kind.images] or []) if kind.images is not None else []
    own, messages = [], []
    for message in row[str(kind.messages)] or []:
        content = message.get("content")
        parts = _split_placeholders(content, processor.image_token) if isinstance(content, str) else content or []
        plain = [_plain_part(part, own) for part in parts]
        for part in plain:
            if part["type"] == "text":
                part["text"] = processor.escape_special_tokens(part["text"])
        messages.append({"role": message["role"], "content": plain})
    if not messages:
        return "", []
    try:
        text = processor.apply_chat_template(messages, tokenize=False)
    # templates raise what they like
    except Exception as error:
        raise LeftOut("chat not readable", str(error)) from error
    wanted = sum(part["type"] == "image" for message in messages for part in message["content"])
    pictures = own or listed
    if len(pictures) != wanted:
        raise LeftOut("pictures missing in chat", f"{wanted} placeholders and {len(pictures)} pictures")
    return text, pictures  # pyright: ignore[reportReturnType]


def _split_placeholders(text: str, placeholder: str) -> Iterator[dict]:
    for index, part in enumerate(text.split(placeholder)):
        if index:
            yield {"type": "image"}
        if part:
            yield {"type": "text", "text": part}


def _plain_part(part: Any, pictures: list) -> dict:
    if not isinstance(part, dict):
        raise LeftOut("chat not readable", f"a part of a message is {str(part)[:100]!r}")
    for name in ("image", "url", "path"):
        if part.get("type") == "image" and part.get(name) is not None:
            pictures.append(part[name])
    if part.get("type") == "image":
        return {"type": "image"}
    return {"type": "text", "text": part.get("text") or ""}


__all__ = ["PictureSegment", "read_messages", "read_segments", "row_pictures", "text_length"]
