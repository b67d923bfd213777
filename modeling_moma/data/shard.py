# SPDX-License-Identifier: Apache-2.0
"""A shard while it is tokenized: its rows, what makes ids and codes of them, and the report of what became of them."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tokenization.audio_codecs_moma import AUDIO

from ..errors_moma import InputError
from .encoding import DocumentEncoder
from .images import SkippedRow, read_image
from .sounds import read_row_sound, refused_sounds_left_out
from .templates import as_text, is_something


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

    def leave_out(self, row: int, error: SkippedRow, is_whole: bool = True) -> None:
        """Count and name a row, or an image of it."""
        (self.left_out if is_whole else self.images_left_out)[error.reason] += 1
        self.named.append({"row": row, "reason": error.reason, "detail": error.detail[:300]})

    def write_document(self, split: str, text: int, image: int = 0, **others: int) -> None:
        """Count a document of so many tokens of each modality."""
        self.written[split] += 1
        self.tokens.setdefault(split, Counter()).update({"text": text, "image": image, **others})


@dataclass
class Shard(ABC):
    """What a kind of source makes its documents of."""

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
    on_work: Callable[[int], object] | None = None

    def __post_init__(self):
        self.processor, self.report = self.encoder.processor, ShardReport()

    @abstractmethod
    def rows(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yield number, split and columns of every row that can be read."""

    def leave_out(self, row: int, error: SkippedRow, is_whole: bool = True) -> None:
        """Count a row that cannot be used, or an image of it."""
        if self.is_strict:
            reason = str(error).rstrip(".")
            raise InputError(
                f"{self.where}, row {row}: {reason}. Without `--strict` such rows are left out."
            ) from error
        self.report.leave_out(row, error, is_whole)

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

    def count_images(self, number: int) -> None:
        """Count images that have been coded."""
        self.report.images += number
        if self.on_work is not None:
            self.on_work(number)

    def document(self, row: int, split: str, ids: list[int], num_codes: int) -> tuple[str, dict[str, Any]] | None:
        """Return split and fields of a document of token ids, `None` where it is too long to be trained on."""
        if not self.packed and len(ids) > self.sequence_length:
            message = f"{len(ids)} tokens, over {self.sequence_length}; packed training cuts it instead"
            self.leave_out(row, SkippedRow("document too long", message))
            return None
        others = {
            name: int(np.isin(ids, range(*self.processor.frames[name].bounds)).sum()) for name in self.processor.codecs
        }
        others = {name: number for name, number in others.items() if number}
        self.report.write_document(split, len(ids) - num_codes - sum(others.values()), num_codes, **others)
        return split, {"row": row, "input_ids": ids}
