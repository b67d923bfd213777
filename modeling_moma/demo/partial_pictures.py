# SPDX-License-Identifier: Apache-2.0
"""Pictures of which only the first codes are there yet."""

import math
from typing import Any

from PIL import Image


# of a picture's place that has no code yet
PAPER = (226, 230, 232)


class PartialPictures:
    """Shows what codes in raster order make of a picture before the last of them is there.

    The decoder wants all codes, so those of a white picture stand for the missing ones; their patches are then covered
    with [`PAPER`], so that nobody takes them for part of the drawing.

    Args:
        processor: a [`MomaProcessor`] whose picture tokenizer has a decoder.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        side = processor.vq_model.config.resolution
        (self.white,) = processor.encode_pictures([Image.new("RGB", (side, side), "white")])

    def decode(self, rows: list[list[int]]) -> list[Image.Image]:
        """
        Pictures of rows of codes, whole or not.

        Args:
            rows: the first codes of each picture, from 0 and at most `image_seq_length`.

        Raises:
            ValueError: there are more codes than a picture has.
        """
        whole = self.processor.image_seq_length
        for row in rows:
            if len(row) > whole:
                raise ValueError(f"`rows`: a picture has {whole} codes, got {len(row)}.")
        pictures = self.processor.decode_pictures([row + self.white[len(row) :] for row in rows])
        return [self._cover(picture, len(row)) for picture, row in zip(pictures, rows)]

    def parts(self, ids: list[int]) -> list[str | Image.Image]:
        """Words and pictures of token ids that may end inside a picture; see `MomaProcessor.decode_parts`."""
        begin, end = self.processor.begin_image_token_id, self.processor.end_image_token_id
        last = len(ids) - 1 - ids[::-1].index(begin) if begin in ids else None
        if last is None or end in ids[last:]:
            return self.processor.decode_parts(ids)
        codes = [token - self.processor.image_token_offset for token in ids[last + 1 :]]
        return [*self.processor.decode_parts(ids[:last]), *self.decode([codes])]

    def _cover(self, picture: Image.Image, count: int) -> Image.Image:
        grid = math.isqrt(self.processor.image_seq_length)
        patch = picture.width // grid
        for place in range(count, grid * grid):
            row, column = divmod(place, grid)
            picture.paste(PAPER, (column * patch, row * patch, (column + 1) * patch, (row + 1) * patch))
        return picture


__all__ = ["PAPER", "PartialPictures"]
