# SPDX-License-Identifier: Apache-2.0
"""Small pictures as a page shows them."""

from PIL import Image


LEAST_SIDE = 256


def enlarged(picture: Image.Image) -> Image.Image:
    """A picture of at least [`LEAST_SIDE`] pixels, each pixel a square: browsers would blur a small one."""
    factor = max(1, LEAST_SIDE // picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


__all__ = ["LEAST_SIDE", "enlarged"]
