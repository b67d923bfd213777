# SPDX-License-Identifier: Apache-2.0
"""Images and sounds with texts: what is stored of a row, and documents of it that are drawn for every example."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Features, List, Value
from transformers.utils import logging

from tokenization.audio_codecs_moma import AUDIO
from tokenization.augmentation_moma import NUM_DRAWS, augment_images

from ...errors_moma import InputError
from ...utils.fields import Count, Share
from ...utils.hardware import gains_by_bf16
from ..encoding import DocumentEncoder
from ..images import SkippedRow
from ..stream import LazyDocuments, ShardTable
from .base import BATCH, Shard, SourceKind, Template, source_kind


logger = logging.get_logger(__name__)

# random numbers that are passed over at once
_SKIPPED_DRAWS = 1 << 22


@dataclass(frozen=True)
class Alternative:
    """A further caption that sometimes stands in for the first one.

    Args:
        text (`str`):
            a column, or a template such as `"{style} tags: {keywords}"`. Lists are joined by `", "` in random order.
        share (`float`):
            of the rows in which all of its columns hold something and none before it was drawn.
    """

    __pydantic_config__ = {"extra": "forbid"}

    text: str
    share: Share


class PairKind(SourceKind):
    """An item, such as an image or a sound, and its texts in every row."""

    text: str
    item: ClassVar[str]

    def columns(self) -> list[str]:
        return [getattr(self, self.discriminator_fields[0]), *self.stored_columns()]

    def stored_columns(self) -> list[str]:
        return list(dict.fromkeys(name for template in self.templates() for name in template.columns))

    def templates(self) -> list[Template]:
        """Return the template of the text, and those that sometimes stand in for it."""
        return [Template(self.text)]

    def row_texts(self, row: dict[str, Any]) -> Iterator[str]:
        yield from (text for template in self.templates() for text in template.texts(row))


@source_kind
@dataclass(frozen=True)
class CaptionKind(PairKind):
    """An image and its caption in every row: `<bos> image caption <eos>` or `<bos> caption image <eos>`.

    Args:
        image (`str`):
            column of the image.
        text (`str`):
            column of the caption, or a template such as `"{style}: {label}"`.
        alternatives (`tuple[Alternative, ...]`, *optional*, defaults to `()`):
            further captions, tried in their order, the first one that is drawn counts.
        image_first (`float`, *optional*, defaults to `0.5`):
            share of the examples in which the image comes first.
        without_caption (`float`, *optional*, defaults to `0.1`):
            share of the other examples that have no caption, which guidance needs.
        codings (`int`, *optional*, defaults to `1`):
            codings of a training image; all but the first are of slightly changed images.
        min_side (`int`, *optional*, defaults to `8`):
            images with a shorter side, in pixels, are left out.
    """

    image: str
    text: str
    alternatives: tuple[Alternative, ...] = ()
    image_first: Share = 0.5
    without_caption: Share = 0.1
    codings: Count = 1
    min_side: Count = 8

    name = "caption"
    discriminator_fields = ("image",)
    hint = "`image` and `text` of captions"
    has_images = has_captions = True
    item = "image"
    # shards of whole batches
    batch_multiple = BATCH

    def tokenized_fields(self) -> dict[str, Any]:
        return {"image": self.image, "codings": self.codings, "min_side": self.min_side}

    def templates(self) -> list[Template]:
        return [Template(self.text), *(Template(alternative.text) for alternative in self.alternatives)]

    def caption_lengths(self, columns: Mapping[str, Any], encoder: DocumentEncoder) -> list[int]:
        """Return the tokens of each caption of a row with its image, in the order of the templates."""
        # beginning and end of the document and of the image
        around = len(encoder.beginning) + 3 + encoder.processor.image_seq_length
        texts = (text for template in self.templates() for text in template.texts(columns))
        return [around + len(encoder.text_ids(text)) for text in texts]

    def row_images(self, row: dict[str, Any]) -> list[Any]:
        return [row[self.image]]

    def features(self, shard: Shard) -> Features:
        processor = shard.processor
        code = Value("uint16" if processor.codebook_size <= 1 << 16 else "int32")
        codes = List(code, length=self.num_codings(shard) * processor.image_seq_length)
        return Features({"row": Value("int64"), "codes": codes, **self.stored_features(shard)})

    def num_codings(self, shard: Shard) -> int:
        """Return the codings of each image of a shard; held-out images are not changed."""
        return self.codings if shard.is_training else 1

    def documents(self, shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
        # changed images have random numbers behind those that other shards change
        generator = augmentation_generator(shard.seed, shard.start * (self.num_codings(shard) - 1))
        rows = shard.read_rows(partial(self._read_row, shard))
        while batch := list(islice(rows, BATCH)):
            images = torch.cat([pixel_values for _, _, (_, _, pixel_values) in batch])
            codes = self._code(shard, images, generator)
            shard.report.images += len(batch)
            for (index, split, (columns, length, _)), row_codes in zip(batch, codes.tolist(), strict=True):
                shard.report.write_document(split, length, shard.processor.image_seq_length)
                yield split, {"row": index, "codes": row_codes, **columns}

    def _read_row(self, shard: Shard, index: int, row: dict[str, Any]) -> tuple[dict[str, Any], int, torch.Tensor]:
        """Return the columns of a row's captions, the tokens of the first one without the image, and pixel values."""
        columns = {name: shard.stored_text(name, row[name]) for name in self.stored_columns()}
        Template(self.text).empty_columns(columns, "caption")
        lengths = self.caption_lengths(columns, shard.encoder)
        if (longest := max(lengths)) > shard.sequence_length:
            raise SkippedRow("caption too long", f"{longest} tokens with its image, over {shard.sequence_length}")
        length = lengths[0] - shard.processor.image_seq_length
        return columns, length, shard.pixel_values(row[self.image], self.min_side)

    @torch.inference_mode()
    def _code(self, shard: Shard, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the codes `[B, num_codings * image_seq_length]` of images as they are, and of changed ones."""
        codings = [shard.codes(images)]
        device = shard.processor.vq_model.device.type
        # codings of changed images are noise by intent, so the faster precision serves
        is_fast = torch.autocast(device, dtype=torch.bfloat16) if gains_by_bf16(device) else nullcontext()
        with is_fast:
            while len(codings) < self.num_codings(shard):
                codings.append(shard.codes(augment_images(images, generator, 1.0)))
        return torch.stack(codings, dim=1).flatten(1)

    def stored_documents(
        self, source: str, table: ShardTable, encoder: DocumentEncoder, longest: int
    ) -> "CaptionDocuments":
        return CaptionDocuments(source, self, table, encoder, longest)


def augmentation_generator(seed: int, images: int) -> torch.Generator:
    """Return the random numbers of changed images, behind those of so many images that other shards change."""
    generator = torch.Generator().manual_seed(seed)
    draws = images * NUM_DRAWS
    while draws:
        size = min(draws, _SKIPPED_DRAWS)
        torch.rand(size, generator=generator)
        draws -= size
    return generator


class PairDocuments(ABC):
    """Items, such as images or sounds, with texts: what is drawn of a row is an example."""

    can_be_cut, has_choice = False, True

    def __init__(
        self,
        name: str,
        kind: Any,
        table: "ShardTable | _Rows",
        encoder: DocumentEncoder,
        longest: int | None = None,
    ):
        self.name, self.kind, self.table, self.encoder, self.longest = name, kind, table, encoder, longest
        self._text, *self._others = self.kind.templates()
        self._names = kind.stored_columns()

    def __len__(self) -> int:
        return len(self.table)

    @abstractmethod
    def ids(self, row: int, rng: np.random.Generator) -> list[int]:
        """One example of a row."""

    @abstractmethod
    def _plain_ids(self, row: int, item_first: bool) -> list[int]:
        """Return an example without chance."""

    @abstractmethod
    def _longest_example(self, row: int) -> int:
        """Return the tokens of the longest of a row's texts with its item."""

    def lengths(self) -> None:
        """Return nothing: each example of a row has a text of its own."""
        return None

    def row_number(self, row: int) -> int:
        """Where a row stood in the split that was tokenized."""
        return int(self.table.value("row", row))

    def held_out(self, rows: Sequence[int] | None = None) -> LazyDocuments:
        """Both orders of every item as it is, with its first text; all items first come before the rest."""
        rows = range(len(self)) if rows is None else rows
        return LazyDocuments(partial(self._held_out_ids, rows), 2 * len(rows))

    def _held_out_ids(self, rows: Sequence[int], index: int) -> list[int]:
        is_second, place = divmod(index, len(rows))
        return self._plain_ids(rows[place], not is_second)

    def check_texts(self, longest: int) -> None:
        """Warn of rows without a text, and raise where one is too long, as only a tokenization leaves rows out."""
        num_empty = 0
        for row in range(len(self)):
            num_empty += bool(self._text.empty_columns(self._columns(row)))
            if (length := self._longest_example(row)) > longest:
                raise InputError(
                    f"sources: {self.name!r}, row {self.row_number(row)}: a text of the recipe has {length} tokens "
                    f"with its {self.kind.item}, over {longest}; those that were tokenized were others. Tokenize "
                    "anew, which leaves such rows out, or take a longer `sequence_length`."
                )
        if num_empty:
            logger.warning(
                f"sources: {self.name!r}: {num_empty} of {len(self)} rows hold nothing in a column of "
                f"{self._text.columns}, their texts being others than those that were tokenized: they are trained on "
                "all the same. Tokenizing anew leaves them out."
            )

    def _columns(self, row: int) -> dict[str, Any]:
        return {name: self.table.value(name, row) for name in self._names}


class CaptionDocuments(PairDocuments):
    """Captions and images, in the order, with the caption and with the coding that are drawn."""

    kind: CaptionKind

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._alternatives = [(entry, part.share) for entry, part in zip(self._others, self.kind.alternatives)]
        self._num_codes = self.encoder.processor.image_seq_length
        self.num_codings = len(self.table.numbers("codes", 0)) // self._num_codes if len(self.table) else 1

    @classmethod
    def from_rows(
        cls, name: str, kind: CaptionKind, rows: Sequence[Mapping[str, Any]], encoder: DocumentEncoder
    ) -> "CaptionDocuments":
        """Of rows in memory, with `codes` `[num_codings, image_seq_length]` and the columns of the captions."""
        return cls(name, kind, _Rows(rows), encoder)

    def ids(self, row: int, rng: np.random.Generator) -> list[int]:
        """One example of a row."""
        columns = self._columns(row)
        codes = self.codes(row, int(rng.integers(self.num_codings)))
        image_first = rng.random() < self.kind.image_first
        template, text = self._draw_text(columns, image_first, rng)
        ids = self.encoder.caption(text, codes, image_first)
        if self.longest is None or len(ids) <= self.longest:
            return ids
        # that a document fits was found with lists as they are
        return self.encoder.caption(template.render(columns), codes, image_first)

    def expected_length(self, row: int) -> float:
        """Return the mean number of tokens of a row's examples, with lists as they are."""
        columns, codes = self._columns(row), self.codes(row)
        likely, text_tokens = 1.0, 0.0
        for template, share in self._alternatives:
            if not template.empty_columns(columns):
                text_tokens += likely * share * len(self.encoder.text_ids(template.render(columns)))
                likely *= 1 - share
        text_tokens += likely * len(self.encoder.text_ids(self._text.render(columns)))
        alone = (1 - self.kind.image_first) * self.kind.without_caption
        around = len(self.encoder.caption("", codes, True))
        return (1 - alone) * (around + text_tokens) + alone * len(self.encoder.caption("", codes, False))

    def _draw_text(
        self, columns: Mapping[str, Any], image_first: bool, rng: np.random.Generator
    ) -> tuple[Template, str]:
        """Return a template and its text, lists in random order; the text is empty where there is to be no caption."""
        drawn, text = self._text, None
        for template, share in self._alternatives:
            if text is None and not template.empty_columns(columns) and rng.random() < share:
                drawn, text = template, template.render(columns, rng)
        if not image_first and rng.random() < self.kind.without_caption:
            return drawn, ""
        return drawn, drawn.render(columns) if text is None else text

    def caption(self, row: int) -> str:
        """Return the caption of a row by the first template."""
        return self._text.render(self._columns(row))

    def codes(self, row: int, coding: int = 0) -> np.ndarray:
        """Return the codes `[image_seq_length]` of a row's image, as it is or changed."""
        start = coding * self._num_codes
        return self.table.numbers("codes", row)[start : start + self._num_codes].astype(np.int64)

    def _plain_ids(self, row: int, item_first: bool) -> list[int]:
        return self.encoder.caption(self.caption(row), self.codes(row), item_first)

    def _longest_example(self, row: int) -> int:
        return max(self.kind.caption_lengths(self._columns(row), self.encoder), default=0)


class _Rows:
    """Rows in memory, read as those of a [`ShardTable`]."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def numbers(self, column: str, row: int) -> np.ndarray:
        return np.asarray(self.rows[row][column]).flatten()

    def value(self, column: str, row: int) -> Any:
        return row if column == "row" else self.rows[row][column]


@source_kind
@dataclass(frozen=True)
class AudioKind(PairKind):
    """A sound and its text in every row: `<bos> sound text <eos>` or `<bos> text sound <eos>`.

    Args:
        audio (`str`):
            column of the sound, such as the `Audio` of `datasets`.
        text (`str`):
            column of its text, or a template such as `"{speaker}: {sentence}"`.
        audio_first (`float`, *optional*, defaults to `0.5`):
            share of the examples in which the sound comes first.
    """

    audio: str
    text: str
    audio_first: Share = 0.5

    name = "sound"
    discriminator_fields = ("audio",)
    hint = "`audio` and `text` of sounds"
    has_sounds = True
    item = "sound"

    def tokenized_fields(self) -> dict[str, Any]:
        return {"audio": self.audio}

    def row_sounds(self, row: dict[str, Any]) -> list[Any]:
        return [row[self.audio]]

    def features(self, shard: Shard) -> Features:
        columns = self.stored_features(shard)
        return Features({"row": Value("int64"), "codes": List(Value("int32")), **columns})

    def documents(self, shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
        for index, split, (columns, num_text, codes) in shard.read_rows(partial(self._read_row, shard)):
            shard.report.write_document(split, num_text, audio=len(codes))
            yield split, {"row": index, "codes": codes, **columns}

    def _read_row(self, shard: Shard, index: int, row: dict[str, Any]) -> tuple[dict[str, Any], int, list[int]]:
        """Return the columns of a row's text, the tokens of its document without the codes, and the codes."""
        template = Template(self.text)
        template.empty_columns(row, "text")
        columns = {name: shard.stored_text(name, row[name]) for name in self.stored_columns()}
        # beginning and end of the document and of the sound
        num_text = len(shard.encoder.text_ids(template.render(columns))) + len(shard.encoder.beginning) + 3
        codes = shard.sound_codes(row[self.audio])
        if (length := num_text + len(codes)) > shard.sequence_length:
            raise SkippedRow("sound too long", f"{length} tokens with its text, over {shard.sequence_length}")
        return columns, num_text, codes

    def stored_documents(
        self, source: str, table: ShardTable, encoder: DocumentEncoder, longest: int
    ) -> "AudioDocuments":
        return AudioDocuments(source, self, table, encoder, longest)


class AudioDocuments(PairDocuments):
    """Sounds and their texts, in the order that is drawn."""

    kind: AudioKind

    def ids(self, row: int, rng: np.random.Generator) -> list[int]:
        """One example of a row."""
        audio_first = rng.random() < self.kind.audio_first
        ids = self._plain_ids(row, audio_first, rng)
        # that a document fits was found with lists as they are
        return ids if self.longest is None or len(ids) <= self.longest else self._plain_ids(row, audio_first)

    def _plain_ids(self, row: int, item_first: bool, rng: np.random.Generator | None = None) -> list[int]:
        text = self._text.render(self._columns(row), rng)
        return self.encoder.pair(AUDIO, text, self.table.numbers("codes", row), item_first)

    def _longest_example(self, row: int) -> int:
        return len(self._plain_ids(row, True))


@dataclass(frozen=True)
class ImageKind(SourceKind):
    """Images alone, which only an image tokenizer is trained on; no recipe names it.

    Args:
        image (`str`):
            column of the image.
        min_side (`int`, *optional*, defaults to `8`):
            images with a shorter side, in pixels, are left out.
    """

    image: str
    min_side: Count = 8

    # reports of earlier runs have it
    name = "image"
    has_images = True

    def columns(self) -> list[str]:
        return [self.image]

    def row_images(self, row: dict[str, Any]) -> list[Any]:
        return [row[self.image]]

    def documents(self, shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
        raise InputError(f"{shard.where} is of images alone, which no model reads.")
