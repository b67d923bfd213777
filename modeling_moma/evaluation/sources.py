# SPDX-License-Identifier: Apache-2.0
"""What measures are taken on: held-out documents of a source, and its captioned pictures where it has any."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass
class CaptionedPictures:
    """Held-out pictures with a caption each.

    Args:
        codes: the pictures as they are, `[N, image_seq_length]`.
        captions: `[N]`, what each picture is called.
        pictures: batches of pixel values `[B, 3, H, W]` in [-1, 1], in the order of `codes`; without them what the
            picture tokenizer makes of the codes stands for the real pictures.

    Raises:
        ValueError: codes and captions are of different number, or codes are no table.
    """

    codes: torch.Tensor
    captions: list[str]
    pictures: Iterable[torch.Tensor] | None = None

    def __post_init__(self):
        if self.codes.ndim != 2:
            raise ValueError(f"`codes` has the shape {tuple(self.codes.shape)}: one row of codes for each picture.")
        if len(self.codes) != len(self.captions):
            raise ValueError(f"`codes` has {len(self.codes)} rows, but there are {len(self.captions)} captions.")

    def __len__(self) -> int:
        return len(self.captions)


@dataclass
class HeldOutSource:
    """The held-out part of one source.

    Args:
        documents: `input_ids` each, from `<bos>` to `<eos>`; every token but the first is a target.
        captioned: pictures with captions; none in a source of plain text or interleaved documents.
    """

    documents: Sequence[dict]
    captioned: CaptionedPictures | None = None
