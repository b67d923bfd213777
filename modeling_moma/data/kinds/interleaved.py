# SPDX-License-Identifier: Apache-2.0
"""Documents in which texts and images alternate: lists of segments, or the messages of a chat with their images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tokenization import MomaProcessor

from ...errors_moma import InputError
from ...utils.fields import Count, read_fields
from ..images import LeftOut
from ..shard import BATCH, Shard
from .base import SourceKind, source_kind


@source_kind
@dataclass(frozen=True)
class InterleavedKind(SourceKind):
    """Documents in which texts and images alternate: `<bos> text image text ... <eos>`.

    Args:
        segments (`str`, *optional*):
            column with a list of segments, each a text, `{"text": ...}` or `{"image": ...}`.
        messages (`str`, *optional*):
            instead of it, a column of chat messages, as TRL takes them; the processor's chat template gives the
            document.
        images (`str`, *optional*):
            with `messages`, the column that lists their images in order.
        min_side (`int`, *optional*, defaults to `8`):
            documents with a smaller image, in pixels, are left out.
    """

    segments: str | None = None
    messages: str | None = None
    images: str | None = None
    min_side: Count = 8

    name = "interleaved"
    told_by = ("segments", "messages")
    hint = "`segments` or `messages` of interleaved documents"
    has_images = True

    @property
    def has_chats(self) -> bool:
        return self.messages is not None

    @classmethod
    def from_fields(cls, where: str, fields: dict[str, Any]) -> "InterleavedKind":
        kind = read_fields(cls, fields, where)
        if (kind.segments is None) == (kind.messages is None):
            raise InputError(f"{where} names both `segments` and `messages`: documents are one of them.")
        return kind

    def columns(self) -> list[str]:
        return [name for name in (self.segments, self.messages, self.images) if name is not None]

    def row_texts(self, row: dict[str, Any]) -> Iterator[str]:
        if self.segments is not None:
            try:
                yield from (part for part in read_segments(self, row) if isinstance(part, str))
            except LeftOut:
                # `moma tokenize` names it
                return
            return
        for message in row[str(self.messages)] or []:
            content = message.get("content")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
            yield from (part["text"] for part in parts if isinstance(part, dict) and part.get("text"))

    def row_images(self, row: dict[str, Any]) -> list[Any]:
        if self.segments is not None:
            parts = row[self.segments]
        elif self.images is not None:
            images = row[self.images]
            return images if isinstance(images, list) else [] if images is None else [images]
        else:
            messages = row[str(self.messages)] or []
            contents = [message.get("content") for message in messages if isinstance(message, dict)]
            parts = [part for content in contents if isinstance(content, list) for part in content]
        parts = parts if isinstance(parts, list) else []
        return [part["image"] for part in parts if isinstance(part, dict) and part.get("image") is not None]

    def documents(self, shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
        return _InterleavedWriter(self, shard).documents()


class _InterleavedWriter:
    """Makes ids of documents, the images of several coded together."""

    def __init__(self, kind: InterleavedKind, shard: Shard):
        self.kind, self.shard = kind, shard

    def documents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        waiting: list[tuple[int, str, list[Any]]] = []
        num_images = 0
        for index, split, row in self.shard.rows():
            try:
                parts = self._read_chat(row) if self.kind.has_chats else self._read_segments(index, row)
            except LeftOut as error:
                self.shard.leave_out(index, error)
                continue
            waiting.append((index, split, parts))
            num_images += sum(isinstance(part, torch.Tensor) for part in parts)
            if num_images >= BATCH or len(waiting) >= BATCH:
                yield from self._coded(waiting)
                waiting, num_images = [], 0
        yield from self._coded(waiting)

    def _read_segments(self, index: int, row: dict[str, Any]) -> list[Any]:
        """Return the ids of texts, and pixel values wherever an image stands."""
        shard, parts = self.shard, []
        for part in read_segments(self.kind, row):
            if not isinstance(part, ImageSegment):
                parts.append(shard.encoder.text_ids(part))
                continue
            try:
                parts.append(shard.pixel_values(part.value, self.kind.min_side))
            # the rest of the document makes sense without it
            except LeftOut as error:
                shard.leave_out(index, error, is_whole=False)
        if not any(len(part) for part in parts):
            raise LeftOut("document empty", "neither texts nor images")
        return [shard.encoder.beginning, *parts, [shard.encoder.eos]]

    def _read_chat(self, row: dict[str, Any]) -> list[Any]:
        """Return the ids of a chat in the form of the processor's template, and pixel values where an image stands."""
        processor = self.shard.processor
        text, values = read_messages(self.kind, row, processor)
        if not text:
            raise LeftOut("document empty", "no message")
        ids = processor.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
        images = iter([self.shard.pixel_values(value, self.kind.min_side) for value in values])
        parts: list[Any] = [[]]
        for token in ids:
            if token == processor.image_token_id:
                parts += [next(images), []]
            else:
                parts[-1].append(token)
        return parts

    @torch.inference_mode()
    def _coded(self, waiting: list[tuple[int, str, list[Any]]]) -> Iterator:
        shard = self.shard
        images = [part for _, _, parts in waiting for part in parts if isinstance(part, torch.Tensor)]
        chunks = [torch.cat(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        codes = iter([row for chunk in chunks for row in shard.codes(chunk).tolist()])
        shard.count_images(len(images))
        for index, split, parts in waiting:
            ids, num_images = [], 0
            for part in parts:
                is_image = isinstance(part, torch.Tensor)
                num_images += is_image
                ids += shard.processor.image_ids(next(codes)) if is_image else part
            document = shard.document(index, split, ids, num_images * shard.processor.image_seq_length)
            if document is not None:
                yield document


@dataclass(frozen=True)
class ImageSegment:
    """An image in a document, as the row holds it: bytes, path, address or what `datasets` keeps of one."""

    value: Any


def read_segments(kind: InterleavedKind, row: dict[str, Any]) -> list[str | ImageSegment]:
    """Return the texts and images of a row in their order.

    Args:
        kind (`InterleavedKind`):
            names the column `segments`.
        row (`dict[str, Any]`):
            with that column, a list whose entries are texts, `{"text": ...}`, `{"image": ...}` or `{"type": "text",
            "text": ...}`.

    Raises:
        LeftOut: the column holds something else, or nothing.
    """
    return [part for part in map(_read_segment, row[str(kind.segments)] or []) if part != ""]


def _read_segment(entry: Any) -> str | ImageSegment:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, dict):
        # rows of one table have all columns, those that do not apply as None
        text, image = entry.get("text"), entry.get("image")
        if image is not None and entry.get("type", "image") in ("image", None):
            return ImageSegment(image)
        if isinstance(text, str) and entry.get("type", "text") in ("text", None):
            return text
    raise LeftOut(
        "segment unknown", f"{str(entry)[:100]!r} is neither a text nor {{'text': ...}} nor {{'image': ...}}"
    )


def read_messages(kind: InterleavedKind, row: dict[str, Any], processor: MomaProcessor) -> tuple[str, list[Any]]:
    """Return a chat in the form of the processor's template, and its images in order.

    Args:
        kind (`InterleavedKind`):
            names the columns `messages` and perhaps `images`.
        row (`dict[str, Any]`):
            with these. Messages have `role` and `content`, a text (in which `<image>` stands for the next image) or a
            list of `{"type": "text", "text": ...}` and `{"type": "image"}`; TRL's format.
        processor (`MomaProcessor`):
            gives the template.

    Returns:
        The text, special tokens in messages marked as plain text, and a value for each `<image>` in it.

    Raises:
        LeftOut: messages are malformed, or images and placeholders are of different number.
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
    images = own or listed
    if len(images) != wanted:
        raise LeftOut("images missing in chat", f"{wanted} placeholders and {len(images)} images")
    return text, images  # pyright: ignore[reportReturnType]


def _split_placeholders(text: str, placeholder: str) -> Iterator[dict]:
    for index, part in enumerate(text.split(placeholder)):
        if index:
            yield {"type": "image"}
        if part:
            yield {"type": "text", "text": part}


def _plain_part(part: Any, images: list) -> dict:
    if not isinstance(part, dict):
        raise LeftOut("chat not readable", f"a part of a message is {str(part)[:100]!r}")
    for name in ("image", "url", "path"):
        if part.get("type") == "image" and part.get(name) is not None:
            images.append(part[name])
    if part.get("type") == "image":
        return {"type": "image"}
    return {"type": "text", "text": part.get("text") or ""}


__all__ = ["InterleavedKind", "ImageSegment", "read_messages", "read_segments"]
