# SPDX-License-Identifier: Apache-2.0
"""Sizes that models are compared at, and the tokens that they read.

Shape suffixes:
    B rows, T positions.
"""

import random
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """
    One size, for every architecture.

    Args:
        hidden_size: width of the residual stream.
        intermediate_size: inner width of one feed-forward network, or of one expert.
        num_layers: decoder layers.
        num_heads: attention heads.
        vocab_size: of which the last half are image codes.
        image_length: codes of one image.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    image_length: int = 64

    @property
    def first_code(self) -> int:
        """The id from which on ids are image codes."""
        return self.vocab_size // 2


SHAPES = {
    "tiny": Shape(hidden_size=32, intermediate_size=24, num_layers=2, num_heads=2, vocab_size=128, image_length=8),
    "small": Shape(hidden_size=256, intermediate_size=688, num_layers=6, num_heads=4, vocab_size=2048),
    # the width of `90m`, rounded up to what grouped products take, under a vocabulary that leaves the layers visible
    "medium": Shape(hidden_size=512, intermediate_size=1368, num_layers=8, num_heads=8, vocab_size=8192),
    "large": Shape(hidden_size=1024, intermediate_size=2736, num_layers=12, num_heads=16, vocab_size=8192),
    # the model of recipes/icons.yaml, as small as a study of many runs wants it
    "study": Shape(hidden_size=128, intermediate_size=128, num_layers=4, num_heads=4, vocab_size=5024),
    "90m": Shape(hidden_size=512, intermediate_size=1368, num_layers=8, num_heads=8, vocab_size=65536),
}


def mixed_tokens(shape: Shape, rows: int, length: int, text_share: float = 0.5, seed: int = 0) -> torch.Tensor:
    """
    Ids `[B, T]` of words and of images in turns, each row at another place in the turn.

    Args:
        shape: gives the vocabulary and the length of an image.
        rows: `B`.
        length: `T`.
        text_share: share of words.
        seed: of the ids.
    """
    generator = torch.Generator().manual_seed(seed)
    words_BT = torch.randint(5, shape.first_code, (rows, length), generator=generator)
    codes_BT = torch.randint(shape.first_code, shape.vocab_size, (rows, length), generator=generator)
    period = round(shape.image_length / (1 - text_share))
    phase_B1 = torch.arange(rows).unsqueeze(1) * period // max(rows, 1)
    place_BT = (torch.arange(length) + phase_B1) % period
    return torch.where(place_BT < period - shape.image_length, words_BT, codes_BT)


def in_quarters(rows: int, length: int) -> torch.Tensor:
    """Positions `[B, T]` of rows of four documents each."""
    return (torch.arange(length) % (length // 4)).expand(rows, -1)


def as_captions(rows: int, length: int) -> torch.Tensor:
    """
    Positions `[B, T]` of rows of small images with their captions, some short texts and a few long ones.

    The last document of a row is cut, and the next row begins with its rest, as far as it reaches.
    """
    generator = random.Random(0)
    positions: list[int] = []
    while len(positions) < rows * length:
        kind = generator.random()
        low, high = (66, 85) if kind < 0.88 else (5, 30) if kind < 0.97 else (120, 300)
        positions += range(generator.randint(low, high))
    return torch.tensor(positions[: rows * length]).view(rows, length)


PACKINGS = {"quarters": in_quarters, "captions": as_captions}
