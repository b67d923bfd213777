# SPDX-License-Identifier: Apache-2.0
"""What a kind of source is: texts made of columns, a shard while it is tokenized, and all that the library asks."""

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from functools import cached_property
from numbers import Number
from string import Formatter
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from datasets import Features, List, Value

from tokenization.audio_codecs_moma import AUDIO

from ...errors_moma import InputError
from ...utils.fields import read_fields, refuse_unknown
from ..encoding import DocumentEncoder
from ..images import SkippedRow, read_image, read_row_sound, refused_sounds_left_out
from ..stream import Documents, ShardTable, TokenDocuments


@dataclass(frozen=True)
class Template:
    """A text with places for the columns of a row."""

    text: str

    @cached_property
    def parts(self) -> list[tuple[str, str | None]]:
        """Pairs of a fixed text and the column after it, if any."""
        if "{" not in self.text:
            return [("", self.text)]
        try:
            parsed = list(Formatter().parse(self.text))
        except ValueError as error:
            raise InputError(f"template {self.text!r} cannot be read: {error}.") from error
        if any(name == "" or spec or conversion for _, name, spec, conversion in parsed):
            raise InputError(f"template {self.text!r}: braces hold names of columns and nothing else.")
        if all(name is None for _, name, _, _ in parsed):
            raise InputError(f"template {self.text!r} names no column: a column stands in single braces, {{label}}.")
        return [(fixed, name) for fixed, name, _, _ in parsed]

    @cached_property
    def columns(self) -> list[str]:
        """The columns, each once."""
        return list(dict.fromkeys(name for _, name in self.parts if name is not None))

    def empty_columns(self, row: Mapping[str, Any], what: str = "") -> list[str]:
        """Return the columns that hold nothing in a row; raise [`SkippedRow`] for such a one where it says what is."""
        empty = [name for name in self.columns if not is_something(row[name])]
        if what and empty:
            raise SkippedRow(f"{what} empty", f"nothing in {empty}")
        return empty

    def texts(self, row: Mapping[str, Any]) -> Iterator[str]:
        """Yield the text of a row, unless a column holds nothing, or what is no text."""
        with suppress(SkippedRow):
            if not self.empty_columns(row):
                yield self.render(row)

    def render(self, row: Mapping[str, Any], rng: np.random.Generator | None = None) -> str:
        """Return the text of a row."""
        return "".join(fixed + ("" if name is None else as_text(name, row[name], rng)) for fixed, name in self.parts)


def is_something(value: Any) -> bool:
    """Return whether there is a text in a value: not in an empty one, in NaN, nor in a list of these."""
    if isinstance(value, (list, tuple)):
        return any(map(is_something, value))
    return not _is_nothing(value) and str(value).strip() != ""


def _is_nothing(value: Any) -> bool:
    # a cell of numbers that is empty may be NaN, which alone differs from itself
    return value is None or (isinstance(value, float) and value != value)


def as_text(name: str, value: Any, rng: np.random.Generator | None = None) -> str:
    """Return the text of a value, see [`Template.render`]."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        entries = list(value) if rng is None else [value[place] for place in rng.permutation(len(value))]
        return ", ".join(as_text(name, entry) for entry in entries if is_something(entry))
    if _is_nothing(value):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        # columns of whole numbers with an empty cell are read as fractions
        return str(int(value))
    if isinstance(value, (Number, date, time, timedelta)):
        return str(value)
    kind = type(value).__name__
    raise SkippedRow("text not readable", f"column {name!r} holds a {kind}; a text is made of texts, numbers or lists")


T = TypeVar("T")
# images that are coded together; rows of a shard of captions are a multiple
BATCH = 128


@dataclass
class ShardReport:
    """What became of the rows of a shard."""

    rows: int = 0
    images: int = 0
    written: Counter = field(default_factory=Counter)
    tokens: dict[str, Counter] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)
    images_left_out: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)
    named: list[dict] = field(default_factory=list)

    def write_document(self, split: str, text: int, image: int = 0, **others: int) -> None:
        """Count a document of so many tokens of each modality."""
        self.written[split] += 1
        self.tokens.setdefault(split, Counter()).update({"text": text, "image": image, **others})


@dataclass
class Shard:
    """What a kind of source makes its documents of: number, split and columns of rows that are read one by one."""

    source_rows: Iterator[tuple[int, str, dict[str, Any]]]
    encoder: DocumentEncoder
    packed: bool
    sequence_length: int
    list_columns: list[str]
    is_training: bool
    start: int
    seed: int
    root: str
    where: str
    is_strict: bool = False

    def __post_init__(self):
        self.processor, self.report = self.encoder.processor, ShardReport()

    def read_rows(self, read: Callable[[int, dict[str, Any]], T]) -> Iterator[tuple[int, str, T]]:
        """Yield number, split and what is read of every row, and leave out those that cannot be used."""
        for index, split, row in self.source_rows:
            self.report.rows += 1
            try:
                found = read(index, row)
            except SkippedRow as error:
                self.leave_out(index, error)
            else:
                yield index, split, found

    def leave_out(self, row: int, error: SkippedRow, is_whole: bool = True) -> None:
        """Count a row that cannot be used, or an image of it."""
        if self.is_strict:
            reason = str(error).rstrip(".")
            raise InputError(
                f"{self.where}, row {row}: {reason}. Without `--strict` such rows are left out."
            ) from error
        (self.report.left_out if is_whole else self.report.images_left_out)[error.reason] += 1
        self.report.named.append({"row": row, "reason": error.reason, "detail": error.detail[:300]})

    def pixel_values(self, value: Any, min_side: int) -> torch.Tensor:
        """Return the pixel values `[1, 3, H, W]` of an image as a row holds it."""
        image, changes = read_image(value, self.root, min_side)
        self.report.changed.update(changes)
        return self.processor.image_processor([image], return_tensors="pt")["pixel_values"]

    def codes(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the codes `[B, image_seq_length]` of pixel values `[B, 3, H, W]`."""
        model = self.processor.vq_model
        return model.get_image_tokens(pixel_values.to(model.device, torch.float32)).cpu()

    def stored_text(self, name: str, value: Any) -> str | list[str]:
        """Return a value of a stored column as it is kept: a text, or a list of texts where the column holds lists."""
        if name in self.list_columns:
            return [as_text(name, entry) for entry in value or [] if is_something(entry)]
        return as_text(name, value)

    def sound_codes(self, value: Any) -> list[int]:
        """Return the codes of a sound as a row holds it."""
        codec = self.processor.codecs[AUDIO]
        rate = getattr(codec, "sampling_rate", None)
        item = value if rate is None else read_row_sound(value, rate, self.root)
        # a codec may refuse more than reading does
        with refused_sounds_left_out():
            return self.processor.encode_items(AUDIO, [item])[0]

    def document(self, row: int, split: str, ids: list[int], num_codes: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield split and fields of a document of token ids, nothing where it is too long to be trained on."""
        if not self.packed and len(ids) > self.sequence_length:
            message = f"{len(ids)} tokens, over {self.sequence_length}; packed training cuts it instead"
            self.leave_out(row, SkippedRow("document too long", message))
            return
        others = Counter()
        for name in self.processor.codecs:
            others[name] = int(np.isin(ids, range(*self.processor.frames[name].bounds)).sum())
        # none of those of which there are no tokens
        self.report.write_document(split, len(ids) - num_codes - others.total(), num_codes, **+others)
        yield split, {"row": row, "input_ids": ids}


class SourceKind(ABC):
    """The base of all kinds, each a dataclass under [`source_kind`] whose fields are those of a recipe.

    Attributes:
        name (`ClassVar[str]`):
            singular, for messages and manifests.
        discriminator_fields (`ClassVar[tuple[str, ...]]`, *optional*, defaults to `()`):
            fields that no other kind has: a source that names one of them is of this kind.
        hint (`ClassVar[str]`, *optional*):
            its columns in words, for the message to somebody who names too few.
        has_images (`ClassVar[bool]`, *optional*, defaults to `False`):
            whether rows have images.
        has_sounds (`ClassVar[bool]`, *optional*, defaults to `False`):
            whether all rows have sounds, for which the processor needs a codec.
        has_captions (`ClassVar[bool]`, *optional*, defaults to `False`):
            whether its documents are [`CaptionDocuments`].
        has_chats (`bool`, *optional*, defaults to `False`):
            whether documents are made by the processor's chat template.
        batch_multiple (`ClassVar[int]`, *optional*, defaults to `1`):
            rows of a shard are a multiple of it.
        min_side (`int`, *optional*, defaults to `1`):
            images with a shorter side, in pixels, are left out.
    """

    name: ClassVar[str]
    discriminator_fields: ClassVar[tuple[str, ...]] = ()
    hint: ClassVar[str] = ""
    has_images: ClassVar[bool] = False
    has_sounds: ClassVar[bool] = False
    has_captions: ClassVar[bool] = False
    has_chats = False
    batch_multiple: ClassVar[int] = 1
    min_side: int = 1

    @classmethod
    def from_fields(cls, where: str, fields: dict[str, Any]) -> Self:
        """Return the kind of a recipe's fields, whose names are known to be its own."""
        return read_fields(cls, fields, where)

    def fields(self) -> dict[str, Any]:
        """Return what [`read_kind`] takes as stored."""
        fields: dict[str, Any] = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        fields = {name: value for name, value in fields.items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def tokenized_fields(self) -> dict[str, Any]:
        """Return the fields that tokens were made by: those that a training cannot change any more."""
        return self.fields()

    @abstractmethod
    def columns(self) -> list[str]:
        """Return all columns that are read."""

    def stored_columns(self) -> list[str]:
        """Return the columns that are kept beside the codes: documents are made of them anew for every example."""
        return []

    def stored_features(self, shard: Shard) -> dict[str, Any]:
        """Return the types of the stored columns: texts, or lists of texts where the source's column holds lists."""
        text = Value("string")
        return {name: List(text) if name in shard.list_columns else text for name in self.stored_columns()}

    def row_texts(self, row: dict[str, Any]) -> Iterator[str]:
        """Yield the texts of a row, which a text tokenizer learns from."""
        yield from ()

    def row_images(self, row: dict[str, Any]) -> list[Any]:
        """Return the images of a row in their order, not decoded."""
        return []

    def row_sounds(self, row: dict[str, Any]) -> list[Any]:
        """Return the sounds of a row in their order, not decoded."""
        return []

    def features(self, shard: Shard) -> Features:
        """Return the types of the fields that [`documents`] yields."""
        return Features({"row": Value("int64"), "input_ids": List(Value("int32"))})

    @abstractmethod
    def documents(self, shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield split and fields of every document of a shard, as they are stored.

        Args:
            shard (`Shard`):
                its rows, and what makes ids and codes of them.
        """

    def stored_documents(self, source: str, table: ShardTable, encoder: DocumentEncoder, longest: int) -> Documents:
        """Return documents to train on, of what [`documents`] yielded.

        Args:
            source (`str`):
                its name.
            table (`ShardTable`):
                of its shards.
            encoder (`DocumentEncoder`):
                of the processor that it was tokenized with.
            longest (`int`):
                longest held-out document in tokens.
        """
        frames = [(frame.begin, frame.end) for frame in encoder.processor.frames.values()]
        return TokenDocuments(source, table, longest, frames)


# kinds that a recipe may name, by their name
KINDS: dict[str, type[SourceKind]] = {}


_Kind = TypeVar("_Kind", bound=type[SourceKind])


def source_kind(kind: _Kind) -> _Kind:
    """Make a kind known to recipes, as a decorator of its dataclass.

    Args:
        kind (`type[SourceKind]`):
            the dataclass.

    Raises:
        ValueError: another class has its name or one of the fields that tell it.
    """
    for other in KINDS.values():
        shared = set(other.discriminator_fields) & set(kind.discriminator_fields)
        if other.__qualname__ != kind.__qualname__ and (other.name == kind.name or shared):
            what = f"the field {min(shared)!r}" if shared else f"the name {kind.name!r}"
            raise InputError(f"`source_kind`: {kind.__name__} has {what} of {other.__name__}; choose another.")
    KINDS[kind.name] = kind
    return kind


def read_kind(source: str, fields: dict[str, Any], common: Sequence[str] = ()) -> SourceKind:
    """Return the kind of a source, by the columns that it names."""
    # a kind that nothing tells is taken where no other is; one that was registered later is asked first
    told = [kind for kind in KINDS.values() if fields.keys() & set(kind.discriminator_fields)]
    kind = [*(kind for kind in KINDS.values() if not kind.discriminator_fields), *told][-1]
    where = f"sources: {source!r}"
    entries = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
    known = [entry.name for entry in entries]
    # any source has the common ones, so the error lists them as well
    refuse_unknown(fields, [*common, *known], where, f"a source of {kind.name}s")
    missing = [entry.name for entry in entries if entry.default is dataclasses.MISSING and entry.name not in fields]
    if missing:
        hints = ", ".join(entry.hint for entry in KINDS.values() if entry.hint)
        raise InputError(f"{where} has no {missing[0]!r}: a source names its columns, {hints}.")
    read = kind.from_fields(where, fields)
    try:
        # templates are read here, before any row is
        read.columns()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return read
