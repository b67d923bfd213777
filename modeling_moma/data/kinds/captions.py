# SPDX-License-Identifier: Apache-2.0
"""Images and sounds with texts: what is stored of a row, and documents of it that are drawn for every example."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Features, List, Value

from tokenization.augmentation_moma import NUM_DRAWS, augment_images

from ...errors_moma import InputError
from ...utils.fields import Count, Share
from ...utils.hardware import gains_by_bf16
from ..encoding import DocumentEncoder
from ..images import SkippedRow
from ..token_documents import HeldOutPairs, ShardTable
from .base import BATCH, Shard, SourceKind, Template, check_changed_texts, source_kind


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


@source_kind
@dataclass(frozen=True)
class CaptionKind(SourceKind):
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
    # shards of whole batches
    batch_multiple = BATCH

    def tokenized_fields(self) -> dict[str, Any]:
        return {"image": self.image, "codings": self.codings, "min_side": self.min_side}

    def columns(self) -> list[str]:
        return [self.image, *self.stored_columns()]

    def stored_columns(self) -> list[str]:
        names = [name for template in self.templates() for name in template.columns]
        return list(dict.fromkeys(names))

    def templates(self) -> list[Template]:
        """Return the caption's template and those of the alternatives."""
        return [Template(self.text), *(Template(alternative.text) for alternative in self.alternatives)]

    def caption_lengths(self, columns: Mapping[str, Any], encoder: DocumentEncoder) -> list[int]:
        """Return the tokens of each caption of a row with its image, in the order of the templates."""
        # beginning and end of the document and of the image
        around = len(encoder.beginning) + 3 + encoder.processor.image_seq_length
        texts = (text for template in self.templates() for text in template.texts(columns))
        return [around + len(encoder.text_ids(text)) for text in texts]

    def row_texts(self, row: dict[str, Any]) -> Iterator[str]:
        yield from (text for template in self.templates() for text in template.texts(row))

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
        return _CaptionWriter(self, shard).documents()

    def stored_documents(
        self, source: str, table: ShardTable, encoder: DocumentEncoder, longest: int
    ) -> "CaptionDocuments":
        return CaptionDocuments.from_table(source, self, table, encoder, longest)


class _CaptionWriter:
    """Codes the images of a shard in batches, beside the columns of their captions."""

    def __init__(self, kind: CaptionKind, shard: Shard):
        self.kind, self.shard, self.num_codings = kind, shard, kind.num_codings(shard)
        self.generator = augmentation_generator(shard.seed, shard.start * (self.num_codings - 1))

    def documents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        waiting: list[tuple[int, str, dict, int]] = []
        images: list[torch.Tensor] = []
        for index, split, row in self.shard.rows():
            try:
                columns, length = self._columns(row)
                pixel_values = self.shard.pixel_values(row[self.kind.image], self.kind.min_side)
            except SkippedRow as error:
                self.shard.leave_out(index, error)
                continue
            images.append(pixel_values)
            waiting.append((index, split, columns, length))
            if len(waiting) == BATCH:
                yield from self._coded(waiting, images)
                waiting, images = [], []
        if waiting:
            yield from self._coded(waiting, images)

    def _columns(self, row: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Return the columns of a row's captions, and the text tokens of the first one with what stands around it."""
        shard, first = self.shard, Template(self.kind.text)
        columns = {name: shard.stored_text(name, row[name]) for name in self.kind.stored_columns()}
        if empty := first.empty_columns(columns):
            raise SkippedRow("caption empty", f"nothing in {empty}")
        lengths = self.kind.caption_lengths(columns, shard.encoder)
        if (longest := max(lengths)) > shard.sequence_length:
            raise SkippedRow("caption too long", f"{longest} tokens with its image, over {shard.sequence_length}")
        return columns, lengths[0] - shard.processor.image_seq_length

    @torch.inference_mode()
    def _coded(self, waiting: list[tuple[int, str, dict, int]], images: list[torch.Tensor]) -> Iterator:
        shard, batch = self.shard, torch.cat(images)
        codings = [shard.codes(batch)]
        device = shard.processor.vq_model.device.type
        # codings of changed images are noise by intent, so the faster precision serves
        is_fast = torch.autocast(device, dtype=torch.bfloat16) if gains_by_bf16(device) else nullcontext()
        with is_fast:
            while len(codings) < self.num_codings:
                codings.append(shard.codes(augment_images(batch, self.generator, 1.0)))
        codes = torch.stack(codings, dim=1).flatten(1)
        shard.count_images(len(waiting))
        for (index, split, columns, length), row_codes in zip(waiting, codes.tolist(), strict=True):
            shard.report.write_document(split, length, shard.processor.image_seq_length)
            yield split, {"row": index, "codes": row_codes, **columns}


def augmentation_generator(seed: int, images: int) -> torch.Generator:
    """Return the random numbers of changed images, behind those of so many images that other shards change."""
    generator = torch.Generator().manual_seed(seed)
    draws = images * NUM_DRAWS
    while draws:
        size = min(draws, _SKIPPED_DRAWS)
        torch.rand(size, generator=generator)
        draws -= size
    return generator


class CaptionDocuments:
    """Captions and images, in the order, with the caption and with the coding that are drawn."""

    can_be_cut, has_choice = False, True

    def __init__(
        self,
        name: str,
        kind: CaptionKind,
        codes: Callable[[int, int], np.ndarray],
        num_codings: int,
        columns: Callable[[int], Mapping[str, Any]],
        length: int,
        encoder: DocumentEncoder,
        row_number: Callable[[int], int] = int,
        longest: int | None = None,
    ):
        self.name, self.kind, self.encoder, self._length = name, kind, encoder, length
        self._codes, self.num_codings, self._columns = codes, num_codings, columns
        self._row_number, self._longest = row_number, longest
        self._text, *others = kind.templates()
        self._alternatives = [(entry, part.share) for entry, part in zip(others, kind.alternatives)]

    @classmethod
    def from_rows(
        cls, name: str, kind: CaptionKind, rows: Sequence[Mapping[str, Any]], encoder: DocumentEncoder
    ) -> "CaptionDocuments":
        """Of rows in memory, with `codes` `[num_codings, image_seq_length]` and the columns of the captions."""
        reader = _CaptionRows(rows)
        return cls(name, kind, reader.codes, reader.num_codings, reader.columns, len(rows), encoder)

    @classmethod
    def from_table(
        cls, name: str, kind: CaptionKind, table: ShardTable, encoder: DocumentEncoder, longest: int | None = None
    ) -> "CaptionDocuments":
        """Of a source's shards."""
        reader = _CaptionTable(table, kind, encoder.processor.image_seq_length)
        parts = (reader.codes, reader.num_codings, reader.columns, len(table), encoder, reader.number)
        return cls(name, kind, *parts, longest)

    def __len__(self) -> int:
        return self._length

    def ids(self, row: int, rng: np.random.Generator) -> list[int]:
        """One example of a row."""
        columns = self._columns(row)
        codes = self._codes(row, int(rng.integers(self.num_codings)))
        image_first = rng.random() < self.kind.image_first
        template, text = self._draw_text(columns, image_first, rng)
        ids = self.encoder.caption(text, codes, image_first)
        if self._longest is None or len(ids) <= self._longest:
            return ids
        # that a document fits was found with lists as they are
        return self.encoder.caption(template.render(columns), codes, image_first)

    def lengths(self) -> None:
        """Return nothing: each example of a row has a text of its own."""

    def expected_length(self, row: int) -> float:
        """Return the mean number of tokens of a row's examples, with lists as they are."""
        columns, codes = self._columns(row), self._codes(row, 0)
        likely, text_tokens = 1.0, 0.0
        for template, share in self._alternatives:
            if template.is_full(columns):
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
            if text is None and template.is_full(columns) and rng.random() < share:
                drawn, text = template, template.render(columns, rng)
        if not image_first and rng.random() < self.kind.without_caption:
            return drawn, ""
        return drawn, drawn.render(columns) if text is None else text

    def check_texts(self, longest: int) -> None:
        """Check captions that are others than those tokenized, see [`check_changed_texts`]."""
        columns = map(self._columns, range(len(self)))
        rows = (
            (
                self.row_number(row),
                self._text.is_full(values),
                max(self.kind.caption_lengths(values, self.encoder), default=0),
            )
            for row, values in enumerate(columns)
        )
        check_changed_texts(self.name, "image", rows, self._text.columns, longest)

    def caption(self, row: int) -> str:
        """Return the caption of a row by the first template."""
        return self._text.render(self._columns(row))

    def codes(self, row: int) -> np.ndarray:
        """Return the codes `[image_seq_length]` of a row's image as it is."""
        return self._codes(row, 0)

    def row_number(self, row: int) -> int:
        """Where a row stood in the split that was tokenized."""
        return self._row_number(row)

    def held_out(self, rows: Sequence[int] | None = None) -> HeldOutPairs:
        """Both orders of every image as it is, with its first caption; all images first come before the rest."""
        return HeldOutPairs(self._plain_ids, range(len(self)) if rows is None else rows)

    def _plain_ids(self, row: int, image_first: bool) -> list[int]:
        return self.encoder.caption(self.caption(row), self.codes(row), image_first)


class _CaptionRows:
    """Captions in memory."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.rows = rows
        self.table = np.asarray([row["codes"] for row in rows], dtype=np.int64)
        self.num_codings = self.table.shape[1]

    def codes(self, row: int, coding: int) -> np.ndarray:
        return self.table[row, coding]

    def columns(self, row: int) -> Mapping[str, Any]:
        return self.rows[row]


class _CaptionTable:
    """Captions in shards."""

    def __init__(self, table: ShardTable, kind: CaptionKind, num_codes: int):
        self.table, self.names, self.num_codes = table, kind.stored_columns(), num_codes
        self.num_codings = len(table.numbers("codes", 0)) // num_codes if len(table) else 1

    def codes(self, row: int, coding: int) -> np.ndarray:
        start = coding * self.num_codes
        return self.table.numbers("codes", row)[start : start + self.num_codes].astype(np.int64)

    def number(self, row: int) -> int:
        return self.table.value("row", row)

    def columns(self, row: int) -> dict[str, Any]:
        return {name: self.table.value(name, row) for name in self.names}


@source_kind
@dataclass(frozen=True)
class AudioKind(SourceKind):
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

    def tokenized_fields(self) -> dict[str, Any]:
        return {"audio": self.audio}

    def columns(self) -> list[str]:
        return [self.audio, *self.stored_columns()]

    def stored_columns(self) -> list[str]:
        return list(Template(self.text).columns)

    def templates(self) -> list[Template]:
        """Return the one of its text."""
        return [Template(self.text)]

    def row_texts(self, row: dict[str, Any]) -> Iterator[str]:
        yield from Template(self.text).texts(row)

    def row_sounds(self, row: dict[str, Any]) -> list[Any]:
        return [row[self.audio]]

    def features(self, shard: Shard) -> Features:
        columns = self.stored_features(shard)
        return Features({"row": Value("int64"), "codes": List(Value("int32")), **columns})

    def documents(self, shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
        template = Template(self.text)
        for index, split, row in shard.rows():
            try:
                if empty := template.empty_columns(row):
                    raise SkippedRow("text empty", f"nothing in {empty}")
                columns = {name: shard.stored_text(name, row[name]) for name in self.stored_columns()}
                num_text = len(shard.encoder.text_ids(template.render(columns)))
                codes = shard.sound_codes(row[self.audio])
                # beginning and end of the document and of the sound
                around = len(shard.encoder.beginning) + 3
                if num_text + len(codes) + around > shard.sequence_length:
                    length = num_text + len(codes) + around
                    raise SkippedRow("sound too long", f"{length} tokens with its text, over {shard.sequence_length}")
            except SkippedRow as error:
                shard.leave_out(index, error)
                continue
            shard.report.write_document(split, num_text + around, audio=len(codes))
            yield split, {"row": index, "codes": codes, **columns}

    def stored_documents(
        self, source: str, table: ShardTable, encoder: DocumentEncoder, longest: int
    ) -> "AudioDocuments":
        return AudioDocuments(source, self, table, encoder, longest)


class AudioDocuments:
    """Sounds and their texts, in the order that is drawn."""

    can_be_cut, has_choice = False, True

    def __init__(self, name: str, kind: AudioKind, table: ShardTable, encoder: DocumentEncoder, longest: int):
        self.longest = longest
        self.name, self.kind, self.table, self.encoder = name, kind, table, encoder
        self.template, self.names = Template(kind.text), kind.stored_columns()

    def __len__(self) -> int:
        return len(self.table)

    def ids(self, row: int, rng: np.random.Generator) -> list[int]:
        """One example of a row."""
        audio_first = rng.random() < self.kind.audio_first
        ids = self._ids(row, audio_first, rng)
        # that a document fits was found with lists as they are
        return ids if len(ids) <= self.longest else self._ids(row, audio_first)

    def lengths(self) -> None:
        """Return nothing: each example of a row has a text of its own."""

    def _columns(self, row: int) -> Mapping[str, Any]:
        return {name: self.table.value(name, row) for name in self.names}

    def _ids(self, row: int, audio_first: bool, rng: np.random.Generator | None = None) -> list[int]:
        columns = self._columns(row)
        text = self.template.render(columns) if rng is None else self.template.render(columns, rng)
        return self.encoder.pair("audio", text, self.table.numbers("codes", row), audio_first)

    def check_texts(self, longest: int) -> None:
        """Check texts that are others than those tokenized, see [`check_changed_texts`]."""
        rows = (
            (int(self.table.value("row", row)), self.template.is_full(self._columns(row)), len(self._ids(row, True)))
            for row in range(len(self))
        )
        check_changed_texts(self.name, "sound", rows, self.template.columns, longest)

    def held_out(self, rows: Sequence[int] | None = None) -> HeldOutPairs:
        """Both orders of every sound; all sounds first come before the rest."""
        return HeldOutPairs(self._ids, range(len(self)) if rows is None else rows)


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
