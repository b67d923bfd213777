# SPDX-License-Identifier: Apache-2.0
"""The three kinds of sources, told apart by the columns that a recipe names."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..errors_moma import InputError
from .templates import Template


@dataclass(frozen=True)
class Alternative:
    """
    A further caption that sometimes stands in for the first one.

    Args:
        text: a column, or a template such as `"{style} tags: {keywords}"`. Lists are joined by `", "` in random order.
        share: of the rows in which all of its columns hold something.
    """

    text: str
    share: float


@dataclass(frozen=True)
class CaptionKind:
    """
    A picture and its caption in every row: `<bos> picture caption <eos>` or `<bos> caption picture <eos>`.

    Args:
        image: column of the picture.
        text: column of the caption, or a template such as `"{style}: {label}"`.
        alternatives: further captions, tried in their order, the first one that is drawn counts.
        picture_first: share of the examples in which the picture comes first.
        without_caption: share of the other examples that have no caption, which guidance needs.
        codings: codings of a training picture; all but the first are of slightly changed pictures.
        min_side: pictures with a shorter side, in pixels, are left out.
    """

    image: str
    text: str
    alternatives: tuple[Alternative, ...] = ()
    picture_first: float = 0.5
    without_caption: float = 0.1
    codings: int = 1
    min_side: int = 8

    name = "caption"

    def columns(self) -> list[str]:
        """All columns that are read."""
        return [self.image, *self.text_columns()]

    def text_columns(self) -> list[str]:
        """The columns of the captions."""
        names = [name for template in self.templates() for name in template.columns]
        return list(dict.fromkeys(names))

    def templates(self) -> list[Template]:
        """The caption's template and those of the alternatives."""
        return [Template(self.text), *(Template(alternative.text) for alternative in self.alternatives)]


@dataclass(frozen=True)
class InterleavedKind:
    """
    Documents in which texts and pictures alternate: `<bos> text picture text ... <eos>`.

    Args:
        segments: column with a list of segments, each a text, `{"text": ...}` or `{"image": ...}`.
        messages: instead of it, a column of chat messages, as TRL takes them; the processor's chat template gives the
            document.
        images: with `messages`, the column that lists their pictures in order.
        min_side: documents with a smaller picture, in pixels, are left out.
    """

    segments: str | None = None
    messages: str | None = None
    images: str | None = None
    min_side: int = 8

    name = "interleaved"

    def columns(self) -> list[str]:
        """All columns that are read."""
        return [name for name in (self.segments, self.messages, self.images) if name is not None]


@dataclass(frozen=True)
class TextKind:
    """
    Texts: `<bos> text <eos>`.

    Args:
        text: a column, or a template of columns.
    """

    text: str

    name = "text"

    def columns(self) -> list[str]:
        """All columns that are read."""
        return list(Template(self.text).columns)


@dataclass(frozen=True)
class PictureKind:
    """
    Pictures alone, which only a picture tokenizer is trained on; no recipe names it.

    Args:
        image: column of the picture.
        min_side: pictures with a shorter side, in pixels, are left out.
    """

    image: str
    min_side: int = 8

    name = "picture"

    def columns(self) -> list[str]:
        """All columns that are read."""
        return [self.image]


Kind = CaptionKind | InterleavedKind | TextKind | PictureKind
KINDS: dict[str, type] = {kind.name: kind for kind in (CaptionKind, InterleavedKind, TextKind)}


def read_kind(source: str, fields: dict[str, Any], common: Sequence[str] = ()) -> Kind:
    """
    The kind of a source, by the columns that it names.

    Args:
        source: its name, for errors.
        fields: what a recipe says of it, but for where its data are.
        common: fields of any source, which may stand beside them, for errors.

    Raises:
        ValueError: no kind has these fields, or a value is out of range.
    """
    if "segments" in fields or "messages" in fields:
        kind = InterleavedKind
    elif "image" in fields:
        kind = CaptionKind
    else:
        kind = TextKind
    where = f"sources: {source!r}"
    known = [entry.name for entry in dataclasses.fields(kind)]
    unknown = sorted(set(fields) - set(known), key=str)
    if unknown:
        every = [*common, *known]
        close = get_close_matches(str(unknown[0]), every, 1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(
            f"{where} has {unknown[0]!r}, which is no field of a source of {kind.name}s: {meant}It takes {every}."
        )
    missing = [
        entry.name
        for entry in dataclasses.fields(kind)
        if entry.default is dataclasses.MISSING and entry.name not in fields
    ]
    if missing:
        raise InputError(
            f"{where} has no {missing[0]!r}: a source names its columns, `image` and `text` of captions, `segments` "
            "or `messages` of interleaved documents, `text` of texts."
        )
    values = dict(fields)
    if "alternatives" in values:
        values["alternatives"] = tuple(_read_alternative(where, entry) for entry in values["alternatives"])
    result = kind(**values)
    _check(where, result)
    return result


def _read_alternative(where: str, entry: Any) -> Alternative:
    names = [part.name for part in dataclasses.fields(Alternative)]
    if not isinstance(entry, dict) or set(entry) != set(names):
        raise InputError(f"{where}: each of `alternatives` is a mapping of {names}, got {entry!r}.")
    return Alternative(**entry)


def _check(where: str, kind: Kind) -> None:
    if isinstance(kind, InterleavedKind) and (kind.segments is None) == (kind.messages is None):
        raise InputError(f"{where} names both `segments` and `messages`: documents are one of them.")
    if not isinstance(kind, CaptionKind):
        return
    shares = {"picture_first": kind.picture_first, "without_caption": kind.without_caption}
    shares |= {f"alternatives[{index}].share": entry.share for index, entry in enumerate(kind.alternatives)}
    for name, value in shares.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise InputError(f"{where}: {name} = {value!r} is a share, between 0 and 1.")
    if not isinstance(kind.codings, int) or kind.codings < 1:
        raise InputError(f"{where}: codings = {kind.codings!r} must be 1 or more.")


def kind_fields(kind: Kind) -> dict[str, Any]:
    """The fields of a kind, as [`read_kind`] takes them."""
    fields = {entry.name: getattr(kind, entry.name) for entry in dataclasses.fields(kind)}
    if isinstance(kind, CaptionKind):
        fields["alternatives"] = [dataclasses.asdict(entry) for entry in kind.alternatives]
    return {name: value for name, value in fields.items() if value is not None}


__all__ = [
    "KINDS",
    "Alternative",
    "CaptionKind",
    "InterleavedKind",
    "Kind",
    "PictureKind",
    "TextKind",
    "kind_fields",
    "read_kind",
]
