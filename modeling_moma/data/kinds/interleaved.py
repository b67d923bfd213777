# SPDX-License-Identifier: Apache-2.0
"""Texts, and documents in which texts, images and sounds alternate: lists of segments, or the messages of a chat."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from tokenization import MomaProcessor
from tokenization.audio_codecs_moma import AUDIO
from tokenization.text_tokenizer_moma import IMAGE

from ...errors_moma import InputError
from ...utils.fields import Count, read_fields
from ..encoding import has_caption_template
from ..images import SkippedRow
from .base import BATCH, Shard, SourceKind, Template, source_kind


@source_kind
@dataclass(frozen=True)
class TextKind(SourceKind):
    """Texts: `<bos> text <eos>`.

    Args:
        text (`str`):
            a column, or a template of columns.
    """

    text: str

    name = "text"
    hint = "`text` of texts"

    def columns(self) -> list[str]:
        return list(Template(self.text).columns)

    def row_texts(self, row: dict[str, Any]) -> Iterator[str]:
        yield from Template(self.text).texts(row)

    def documents(self, shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
        for index, split, text in shard.read_rows(self._read_row):
            yield from shard.document(index, split, shard.encoder.document([text]), 0)

    def _read_row(self, index: int, row: dict[str, Any]) -> str:
        template = Template(self.text)
        template.empty_columns(row, "text")
        return template.render(row)


# of an image and its caption, in either order
_CAPTION_CHATS = (["user"], ["assistant"], ["user", "assistant"])
_PLURALS = {IMAGE: "images", AUDIO: "sounds"}


@dataclass(frozen=True)
class Segment:
    """An image or a sound in a document, as the row holds it: bytes, path, address or what `datasets` keeps of one."""

    modality: str
    value: Any


@source_kind
@dataclass(frozen=True)
class InterleavedKind(SourceKind):
    """Documents in which texts, images and sounds alternate: `<bos> text image text ... <eos>`.

    Args:
        segments (`str`, *optional*):
            column with a list of segments, each a text, `{"text": ...}`, `{"image": ...}` or `{"audio": ...}`.
        messages (`str`, *optional*):
            instead of it, a column of chat messages, as TRL takes them; the processor's chat template gives the
            document.
        images (`str`, *optional*):
            with `messages`, the column that lists their images in order, or holds the only one.
        audios (`str`, *optional*):
            with `messages`, the column that lists their sounds in order, or holds the only one.
        min_side (`int`, *optional*, defaults to `8`):
            documents with a smaller image, in pixels, are left out.
    """

    segments: str | None = None
    messages: str | None = None
    images: str | None = None
    audios: str | None = None
    min_side: Count = 8

    name = "interleaved"
    discriminator_fields = ("segments", "messages")
    hint = "`segments` or `messages` of interleaved documents"
    has_images = True

    @property
    def has_chats(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.messages is not None

    @classmethod
    def from_fields(cls, where: str, fields: dict[str, Any]) -> "InterleavedKind":
        kind = read_fields(cls, fields, where)
        if (kind.segments is None) == (kind.messages is None):
            named = "neither" if kind.segments is None else "both"
            raise InputError(f"{where} names {named} of `segments` and `messages`: documents are one of them.")
        return kind

    def columns(self) -> list[str]:
        return [name for name in (self.segments, self.messages, self.images, self.audios) if name is not None]

    def row_texts(self, row: dict[str, Any]) -> Iterator[str]:
        # `moma tokenize` names rows that cannot be read
        with suppress(SkippedRow):
            if self.segments is not None:
                yield from (part for part in read_segments(self, row) if isinstance(part, str))
                return
            for message in _listed_messages(self, row):
                content = message["content"]
                parts = [{"text": content}] if isinstance(content, str) else content
                texts = (part.get("text") for part in parts if isinstance(part, dict))
                yield from (text for text in texts if isinstance(text, str) and text)

    def row_images(self, row: dict[str, Any]) -> list[Any]:
        return self._row_items(row, IMAGE, self.images)

    def row_sounds(self, row: dict[str, Any]) -> list[Any]:
        return self._row_items(row, AUDIO, self.audios)

    def _row_items(self, row: dict[str, Any], modality: str, column: str | None) -> list[Any]:
        if self.segments is not None:
            with suppress(SkippedRow):
                parts = [part for part in read_segments(self, row) if isinstance(part, Segment)]
                return [part.value for part in parts if part.modality == modality]
            return []
        messages = _mappings(row[str(self.messages)])
        parts = [part for message in messages for part in _mappings(message.get("content"))]
        own = [item for part in parts if part.get("type") == modality for item in _part_items(part, modality)]
        return own or ([] if column is None else _as_list(row[column]))

    def documents(self, shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
        return _InterleavedWriter(self, shard).documents()


class _InterleavedWriter:
    """Makes ids of documents, the images of several coded together."""

    def __init__(self, kind: InterleavedKind, shard: Shard):
        self.kind, self.shard = kind, shard

    def documents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        waiting: list[tuple[int, str, list[Any]]] = []
        num_images = 0
        for read in self.shard.read_rows(self._read_chat if self.kind.has_chats else self._read_segments):
            waiting.append(read)
            num_images += sum(isinstance(part, torch.Tensor) for part in read[2])
            if num_images >= BATCH or len(waiting) >= BATCH:
                yield from self._coded(waiting)
                waiting, num_images = [], 0
        yield from self._coded(waiting)

    def _read_segments(self, index: int, row: dict[str, Any]) -> list[Any]:
        """Return the ids of texts and sounds, and pixel values wherever an image stands."""
        shard, parts, is_empty = self.shard, [], True
        for part in read_segments(self.kind, row):
            if isinstance(part, str):
                parts.append(shard.encoder.text_ids(part))
                is_empty &= not part.strip()
                continue
            try:
                parts.append(self._read_item(part))
                is_empty = False
            # the rest of the document makes sense without it
            except SkippedRow as error:
                shard.leave_out(index, error, is_whole=False)
        if is_empty:
            raise SkippedRow("document empty", "no text, image or sound")
        return [shard.encoder.beginning, *parts, [shard.encoder.eos]]

    def _read_item(self, segment: Segment) -> torch.Tensor | list[int]:
        """Return the pixel values of an image, or the ids of a sound."""
        shard = self.shard
        if segment.modality == IMAGE:
            # with its begin and end
            self._check_length("image", shard.processor.image_seq_length + 2)
            return shard.pixel_values(segment.value, self.kind.min_side)
        if AUDIO not in shard.processor.codecs:
            raise SkippedRow("sound not readable", "the processor has no codec of sounds")
        ids = shard.processor.frame_ids(AUDIO, shard.sound_codes(segment.value))
        self._check_length("sound", len(ids))
        return ids

    def _check_length(self, what: str, length: int) -> None:
        """Raise `SkippedRow` for what no sequence holds together with the token that comes before it."""
        if length >= self.shard.sequence_length:
            raise SkippedRow(
                f"{what} too long", f"{length} tokens and one before them, over {self.shard.sequence_length}"
            )

    def _read_chat(self, index: int, row: dict[str, Any]) -> list[Any]:
        """Return the ids of a chat in the form of the processor's template, and pixel values where an image stands."""
        processor = self.shard.processor
        text, segments = read_messages(self.kind, row, processor)
        if not text:
            raise SkippedRow("document empty", "no text, image or sound in its messages")
        ids = processor.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
        # of one token it is a number
        placeholder_id: Any = processor.tokenizer.convert_tokens_to_ids
        placeholders = {placeholder_id(f"<{name}>") for name in processor.frames}
        written = [token for token in ids if token in placeholders]
        # a template that leaves a turn out, or repeats it, would give the others' images to the wrong turns
        if written != [placeholder_id(f"<{segment.modality}>") for segment in segments]:
            what = f"wrote {len(written)} images and sounds of {len(segments)}, or in another order"
            raise SkippedRow("chat not readable", f"the chat template {what}")
        items = iter([self._read_item(segment) for segment in segments])
        parts: list[Any] = [[]]
        for token in ids:
            if token in placeholders:
                parts += [next(items), []]
            else:
                parts[-1].append(token)
        return parts

    @torch.inference_mode()
    def _coded(self, waiting: list[tuple[int, str, list[Any]]]) -> Iterator:
        shard = self.shard
        images = [part for _, _, parts in waiting for part in parts if isinstance(part, torch.Tensor)]
        chunks = [torch.cat(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        codes = iter([row for chunk in chunks for row in shard.codes(chunk).tolist()])
        shard.report.images += len(images)
        for index, split, parts in waiting:
            ids, num_images = [], 0
            for part in parts:
                is_image = isinstance(part, torch.Tensor)
                num_images += is_image
                ids += shard.processor.image_ids(next(codes)) if is_image else part
            yield from shard.document(index, split, ids, num_images * shard.processor.image_seq_length)


def read_segments(kind: InterleavedKind, row: dict[str, Any]) -> list[str | Segment]:
    """Return the texts, images and sounds of a row in their order."""
    entries = row[str(kind.segments)]
    if entries is not None and not isinstance(entries, list):
        raise SkippedRow("segment unknown", f"{str(kind.segments)!r} holds {str(entries)[:100]!r}, which is no list")
    return [part for part in map(_read_segment, entries or []) if part != ""]


def _read_segment(entry: Any) -> str | Segment:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, dict):
        # rows of one table have all columns, those that do not apply as None or as an empty text
        names = [name for name in ("text", IMAGE, AUDIO) if entry.get("type") in (name, None)]
        given = [name for name in names if not _is_nothing(entry.get(name))]
        held = [name for name in given if entry[name] != ""] or given[:1]
        if len(held) > 1:
            raise SkippedRow("segment unknown", f"{str(entry)[:100]!r} holds {' and '.join(held)}: which comes first?")
        if held and held[0] != "text":
            return Segment(held[0], entry[held[0]])
        if held and isinstance(entry["text"], str):
            return entry["text"]
    raise SkippedRow(
        "segment unknown",
        f"{str(entry)[:100]!r} is neither a text nor {{'text': ...}}, {{'image': ...}}, {{'audio': ...}}",
    )


def _is_nothing(value: Any) -> bool:
    """Return whether a column holds nothing, which tables may keep as a mapping of `None`."""
    return value is None or (isinstance(value, dict) and all(entry is None for entry in value.values()))


def read_messages(kind: InterleavedKind, row: dict[str, Any], processor: MomaProcessor) -> tuple[str, list[Segment]]:
    """Return a chat in the form of the processor's template, and its images and sounds in order."""
    own: dict[str, list[Any]] = {name: [] for name in (IMAGE, AUDIO) if name in processor.frames}
    listed = {IMAGE: kind.images, AUDIO: kind.audios}
    messages, given = [], _listed_messages(kind, row)
    roles = [message["role"] for message in given]
    if roles not in ([], *_CAPTION_CHATS) and has_caption_template(processor):
        raise _unreadable("the chat template of captions has no place for messages of", roles)
    for message in given:
        content = message["content"]
        parts = _split_placeholders(content, own) if isinstance(content, str) else content
        plain = [_plain_part(part, own) for part in parts]
        for part in plain:
            if part["type"] == "text":
                part["text"] = processor.escape_special_tokens(part["text"])
        messages.append({"role": processor.escape_special_tokens(message["role"]), "content": plain})
    # a template may write turns of nothing
    if not any(part["type"] != "text" or part["text"].strip() for message in messages for part in message["content"]):
        return "", []
    try:
        text = processor.apply_chat_template(messages, tokenize=False)
    # templates raise what they like
    except Exception as error:
        raise SkippedRow("chat not readable", str(error)) from error
    order = [part["type"] for message in messages for part in message["content"] if part["type"] != "text"]
    items = {}
    for modality, found in own.items():
        column, wanted = listed.get(modality), order.count(modality)
        found = found or ([] if column is None else _as_list(row[column]))
        if len(found) != wanted:
            raise SkippedRow(f"{_PLURALS[modality]} missing in chat", f"{wanted} placeholders and {len(found)} items")
        items[modality] = iter(found)
    return text, [Segment(modality, next(items[modality])) for modality in order]  # pyright: ignore[reportReturnType]


def _listed_messages(kind: InterleavedKind, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a row, each with a `role` and a text or a list as `content`."""
    messages = row[str(kind.messages)]
    if messages is not None and not isinstance(messages, list):
        raise _unreadable(f"{str(kind.messages)!r} holds", messages)
    listed = []
    for message in messages or []:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _unreadable("a message without `role` and `content` is", message)
        content = message.get("content") or ""
        if called := {name for name in ("tool_calls", "function_call") if message.get(name)}:
            raise _unreadable("only `role` and `content` of a message are read, and one has", min(called))
        if not isinstance(content, str | list):
            raise _unreadable("the content of a message is", content)
        listed.append({"role": message["role"], "content": content})
    return listed


def _unreadable(what: str, value: Any) -> SkippedRow:
    return SkippedRow("chat not readable", f"{what} {value if isinstance(value, str) else str(value)!r:.100}")


def _as_list(value: Any) -> list[Any]:
    """Return what a column holds as a list: itself, or the one thing that it is."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _mappings(value: Any) -> list[dict[str, Any]]:
    """Return the mappings among the entries of a list, none of what is no list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _part_items(part: dict[str, Any], modality: str) -> list[Any]:
    """Return the image or sound that a part of a message itself holds, or where it lies."""
    values = [part.get(name) for name in (modality, "url", "path")]
    return [value for value in values if not _is_nothing(value) and not (isinstance(value, str) and value == "")]


def _split_placeholders(text: str, modalities: Iterable[str]) -> Iterator[dict]:
    pattern = "|".join(re.escape(name) for name in modalities)
    for index, part in enumerate(re.split(f"<({pattern})>", text)):
        # every second one is the name in a placeholder
        if index % 2:
            yield {"type": part}
        elif part:
            yield {"type": "text", "text": part}


def _plain_part(part: Any, items: dict[str, list[Any]]) -> dict:
    if not isinstance(part, dict):
        raise _unreadable("a part of a message is", part)
    modality = part.get("type")
    if modality in items:
        items[modality] += _part_items(part, modality)
        return {"type": modality}
    # a chat without what is spoken of makes another sense
    if modality not in (None, "text"):
        raise _unreadable(f"the processor knows text, {', '.join(items)}, and a part is of type", modality)
    text = part.get("text") or ""
    if not isinstance(text, str):
        raise _unreadable("the text of a message is", text)
    return {"type": "text", "text": text}
