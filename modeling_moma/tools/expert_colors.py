# SPDX-License-Identifier: Apache-2.0
"""Colours of experts, for pictures of the routing."""

from collections.abc import Sequence

from PIL import Image, ImageDraw


# far apart for colour-blind eyes, and apart from the grey of uncovered tokens
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc3311", "#ee82c8", "#66ccee", "#8b5fbf", "#c8d22e",
    "#7a4a1e", "#003f5c", "#ff8f7a", "#2fd3a5",
)  # fmt: skip
UNCOVERED = "#b4b4b4"
# the share of the picture in a patch, and the grey that stands for its black: experts keep their colours
PICTURE_SHARE, DARKEST = 0.3, 110


def expert_colors(config) -> dict[tuple[str, int], str]:
    """A colour for each (group, expert); the groups share none as long as the palette lasts."""
    pairs = [(group, expert) for group in config.expert_groups for expert in range(config.group_num_experts(group))]
    return {pair: PALETTE[number % len(PALETTE)] for number, pair in enumerate(pairs)}


def fill_stripes(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colors: Sequence[str]):
    """Upright stripes of equal width, grey where there is no colour.

    Args:
        pen: of the picture.
        box: left, top, right and bottom in pixels, the last two included.
        colors: from left to right.
    """
    left, top, right, bottom = box
    colors = colors or [UNCOVERED]
    step = (right + 1 - left) / len(colors)
    for index, color in enumerate(colors):
        pen.rectangle((left + round(index * step), top, left + round((index + 1) * step) - 1, bottom), fill=color)


def shaded(colors: Image.Image, picture: Image.Image) -> Image.Image:
    """Colours through which a picture of the same size shows, in grey."""
    grey = picture.convert("L").point([DARKEST + value * (255 - DARKEST) // 255 for value in range(256)])
    return Image.blend(colors, grey.convert("RGB"), PICTURE_SHARE)


__all__ = ["DARKEST", "PALETTE", "PICTURE_SHARE", "UNCOVERED", "expert_colors", "fill_stripes", "shaded"]
