# SPDX-License-Identifier: Apache-2.0
"""Images and sounds of which only the first codes are there, as a page shows them while they are made."""

from typing import Any

import numpy as np
from PIL import Image

from tokenization.audio_codecs_moma import AUDIO

from ..errors_moma import InputError


# the colour of patches that have no code yet
PAPER = (226, 230, 232)


class PartialImages:
    """Shows what codes in raster order make of an image before the last of them is there.

    The decoder wants all codes, so those of a white image stand for the missing ones; their patches are then covered
    with [`PAPER`], which is told apart from the drawing.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        height, width = processor.image_size
        (self.white,) = processor.encode_images([Image.new("RGB", (width, height), "white")])

    def decode(self, rows: list[list[int]]) -> list[Image.Image]:
        """Return the images of rows of codes, complete or not."""
        whole = self.processor.image_seq_length
        for row in rows:
            if len(row) > whole:
                raise InputError(f"`rows`: an image has {whole} codes, got {len(row)}.")
        images = self.processor.decode_images([row + self.white[len(row) :] for row in rows])
        return [self._cover(image, len(row)) for image, row in zip(images, rows)]

    def parts(self, ids: list[int]) -> list[str | Image.Image | np.ndarray]:
        """Return words, images and whole sounds of token ids that may end inside an image or a sound."""
        ids = self._without_unfinished_sound(ids)
        begin, end = self.processor.begin_image_token_id, self.processor.end_image_token_id
        last = len(ids) - 1 - ids[::-1].index(begin) if begin in ids else None
        if last is None or end in ids[last:]:
            return self.processor.decode_parts(ids)
        codes = [token - self.processor.image_token_offset for token in ids[last + 1 :]]
        return [*self.processor.decode_parts(ids[:last]), *self.decode([codes])]

    def _without_unfinished_sound(self, ids: list[int]) -> list[int]:
        frame = self.processor.frames.get(AUDIO)
        if frame is None or frame.begin not in ids:
            return ids
        last = len(ids) - 1 - ids[::-1].index(frame.begin)
        return ids if frame.end in ids[last:] else ids[:last]

    def _cover(self, image: Image.Image, count: int) -> Image.Image:
        rows, columns = self.processor.image_grid
        patch = image.width // columns
        for place in range(count, rows * columns):
            row, column = divmod(place, columns)
            image.paste(PAPER, (column * patch, row * patch, (column + 1) * patch, (row + 1) * patch))
        return image
