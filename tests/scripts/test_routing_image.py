# SPDX-License-Identifier: Apache-2.0

import pytest
from PIL import Image, ImageColor

from helpers.tiny import tiny_config
from modeling_moma.evaluation.routing_images import DARKEST, IMAGE_SHARE, PALETTE, UNCOVERED, expert_colors
from routing_image import (
    IMAGE_SIDE,
    LINE_HEIGHT,
    RoutedExample,
    draw_routing,
    shown_layers,
)
from sheet import MARGIN


def config_of(**num_experts):
    return tiny_config(num_hidden_layers=3, num_experts=num_experts)


def routed(experts_of_codes):
    pieces = ["<bos>", "<|begin_image|>", None, None, None, None, "<|end_image|>", "red", " apple"]
    groups = ["image" if piece is None else "text" for piece in pieces]
    codes = iter(experts_of_codes)
    layer = [next(codes) if piece is None else [0] for piece in pieces]
    return RoutedExample(Image.new("RGB", (64, 64), "black"), pieces, groups, [layer] * 3)


def blended(color):
    """A patch's colour with the black image in it."""
    channels = ImageColor.getrgb(color)
    return tuple(round((1 - IMAGE_SHARE) * channel + IMAGE_SHARE * DARKEST) for channel in channels)


def close(found, expected):
    return all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))


def test_patches_have_their_experts_colours_in_raster_order_stripes_for_several_and_grey_for_none():
    config = config_of(text=2, image=3)
    colors = expert_colors(config)
    sheet = draw_routing([routed([[0], [], [2, 1], [1]])], config)
    # the image itself is black: its top left corner gives the place of the row
    column = [sheet.getpixel((MARGIN + 1, y)) for y in range(sheet.height)]
    top = column.index((0, 0, 0), MARGIN + 4 * LINE_HEIGHT)
    left, quarter = MARGIN + IMAGE_SIDE + MARGIN, IMAGE_SIDE // 4
    expected = {
        (1, 1): colors["image", 0],
        (3, 1): UNCOVERED,
        (0.5, 3): colors["image", 2],
        (1.5, 3): colors["image", 1],
        (3, 3): colors["image", 1],
    }
    for (x, y), color in expected.items():
        assert close(sheet.getpixel((left + int(x * quarter), top + y * quarter)), blended(color)), (x, y)


def test_every_expert_of_every_group_has_its_own_colour():
    colors = expert_colors(config_of(text=4, image=4))
    assert len(set(colors.values())) == 8
    assert UNCOVERED not in PALETTE


def test_shown_layers_are_first_middle_and_last():
    assert [shown_layers(count) for count in (1, 2, 3, 6, 24)] == [[0], [0, 1], [0, 1, 2], [0, 2, 5], [0, 11, 23]]


def test_no_example_is_refused_and_every_example_has_its_row():
    config = config_of(text=2, image=3)
    with pytest.raises(ValueError, match="examples"):
        draw_routing([], config)
    one, two = (draw_routing([routed([[0], [], [2, 1], [1]])] * count, config) for count in (1, 2))
    assert two.height - one.height > IMAGE_SIDE
