# SPDX-License-Identifier: Apache-2.0
"""What a kind of source is: the columns that a recipe names, and all that the library asks about its rows."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self, TypeVar

from datasets import Features, List, Value
from transformers.utils import logging

from ...errors_moma import InputError
from ...utils.fields import read_fields, refuse_unknown
from ..encoding import DocumentEncoder
from ..shard import Shard
from ..shards import ShardTable
from ..token_documents import Documents, TokenDocuments


logger = logging.get_logger(__name__)


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
        has_chats (`bool`):
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
    batch_multiple: ClassVar[int] = 1
    min_side: int = 1

    @property
    def has_chats(self) -> bool:
        """Whether documents are made by the processor's chat template."""
        return False

    @classmethod
    def from_fields(cls, where: str, fields: dict[str, Any]) -> Self:
        """Return the kind of a recipe's fields, whose names are known to be its own."""
        return read_fields(cls, fields, where)

    def fields(self) -> dict[str, Any]:
        """Return what [`read_kind`] takes as stored."""
        fields: dict[str, Any] = dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]
        return {name: _as_json(value) for name, value in fields.items() if value is not None}

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


def check_changed_texts(
    source: str, item: str, rows: Iterable[tuple[int, bool, int]], columns: Sequence[str], longest: int
) -> None:
    """Warn of rows without a text, and raise where one is too long, as only a tokenization leaves rows out."""
    num_rows = num_empty = 0
    for number, is_full, length in rows:
        num_rows, num_empty = num_rows + 1, num_empty + (not is_full)
        if length > longest:
            raise InputError(
                f"sources: {source!r}, row {number}: a text of the recipe has {length} tokens with its {item}, over "
                f"{longest}; those that were tokenized were others. Tokenize anew, which leaves such rows out, or "
                "take a longer `sequence_length`."
            )
    if num_empty:
        logger.warning(
            f"sources: {source!r}: {num_empty} of {num_rows} rows hold nothing in a column of {list(columns)}, their "
            "texts being others than those that were tokenized: they are trained on all the same. Tokenizing anew "
            "leaves them out."
        )


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
