# SPDX-License-Identifier: Apache-2.0

from PIL import Image, ImageColor

from helpers.tiny import tiny_config
from modeling_moma.demo.routing_view import SIDE, RoutedExample, RoutingView
from modeling_moma.evaluation.routing_images import UNCOVERED, RoutedTokens
from routing_image import CHIP_HEIGHT, LINE_HEIGHT, draw_routing
from sheet import GAP, MARGIN


CONFIG = tiny_config(num_hidden_layers=3, num_experts={"text": 2, "image": 3})


def routed():
    pieces = ["<bos>", "<|begin_image|>", None, None, None, None, "<|end_image|>", "red", " apple"]
    groups = ["image" if piece is None else "text" for piece in pieces]
    codes = iter([[0], [], [2, 1], [1]])
    layer = [next(codes) if piece is None else [1] for piece in pieces]
    layer[-1] = []
    tokens = RoutedTokens(groups, [layer] * 3, [[False] * len(pieces)] * 3)
    return RoutedExample(Image.new("RGB", (SIDE, SIDE), "black"), pieces, tokens)


def test_every_layer_shows_patches_and_words_in_the_colours_of_their_experts():
    example, view = routed(), RoutingView(CONFIG)
    sheet = draw_routing([example], CONFIG)
    # the image itself is black: its top left corner gives the place of the row
    column = [sheet.getpixel((MARGIN + 1, y)) for y in range(sheet.height)]
    top = next(y for y in range(MARGIN + 4 * LINE_HEIGHT, sheet.height) if column[y : y + 9] == [(0, 0, 0)] * 9)
    for number in (1, 2, 3):
        left = MARGIN + number * (SIDE + MARGIN)
        part = sheet.crop((left, top, left + SIDE, top + SIDE))
        assert part.tobytes() == view.image(example, number - 1).tobytes()
        band = top + SIDE + GAP + CHIP_HEIGHT - 6
        shown = {sheet.getpixel((x, band)) for x in range(left, left + SIDE)}
        assert {ImageColor.getrgb(color) for color in (view.colors["text", 1], UNCOVERED)} <= shown
