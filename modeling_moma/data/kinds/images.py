# SPDX-License-Identifier: Apache-2.0
"""Images alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors_moma import InputError
from ...utils.fields import Count
from ..shard import Shard
from .base import SourceKind


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
