# SPDX-License-Identifier: Apache-2.0
"""Draws which expert took which token: over images, and under the words of their captions."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from modeling_moma.demo.routing_view import SIDE, RoutedExample, RoutingView
from modeling_moma.evaluation.routing_images import PALETTE, fill_stripes, record_routing, token_pieces
from sheet import BACKGROUND, FAINT_COLOR, FONT_SIZE, GAP, MARGIN, TEXT_COLOR, printable


CHIP_HEIGHT, LINE_HEIGHT = 26, 22
# swatches and their text in the legend
SWATCH, SWATCH_GAP = 16, 21


def route_example(model: torch.nn.Module, processor, image: Image.Image, caption: str) -> RoutedExample:
    """The routing of `<bos> image caption` in a model in `eval()` mode."""
    ids = processor(images=[image], text=[f"{processor.image_token}{caption}"], return_tensors="pt")["input_ids"][0]
    square = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
    return RoutedExample(square, token_pieces(processor, ids), record_routing(model, ids))


def shown_layers(num_layers: int) -> list[int]:
    """First, middle and last layer, each once."""
    return sorted({0, (num_layers - 1) // 2, num_layers - 1})


def draw_routing(examples: Sequence[RoutedExample], config) -> Image.Image:
    """
    Draws each example as a row: the image, then for the first, the middle and the last layer the image with each
    patch in the colours of its experts, and the caption's tokens in theirs.
    """
    view, font, layers = RoutingView(config), ImageFont.load_default(FONT_SIZE), shown_layers(config.num_hidden_layers)
    width = MARGIN + (len(layers) + 1) * (SIDE + MARGIN)
    chips = [_place_chips(example.pieces, font) for example in examples]
    heights = [LINE_HEIGHT + SIDE + GAP + max(y for *_, y in placed) + CHIP_HEIGHT + MARGIN for placed in chips]
    lines = _legend(config, view.colors)
    top = 2 * MARGIN + LINE_HEIGHT * len(lines)
    sheet = Image.new("RGB", (width, top + sum(heights)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        x, y = MARGIN, MARGIN + number * LINE_HEIGHT
        for swatch, text in line:
            if swatch is not None:
                fill_stripes(pen, (x, y, x + SWATCH, y + SWATCH), swatch)
                x += SWATCH_GAP
            pen.text((x, y), text, fill=TEXT_COLOR, font=font)
            x += int(font.getlength(text)) + SWATCH
    for example, placed, height in zip(examples, chips, heights, strict=True):
        pen.text((MARGIN, top), "image", fill=FAINT_COLOR, font=font)
        sheet.paste(example.image, (MARGIN, top + LINE_HEIGHT))
        for column, layer in enumerate(layers, start=1):
            left = MARGIN + column * (SIDE + MARGIN)
            pen.text((left, top), f"layer {layer + 1} of {config.num_hidden_layers}", fill=TEXT_COLOR, font=font)
            sheet.paste(view.image(example, layer), (left, top + LINE_HEIGHT))
            for place, text, x, y in placed:
                group, taken = example.routed.groups[place], example.routed.experts[layer][place]
                corner = (left + x, top + LINE_HEIGHT + SIDE + GAP + y)
                _draw_chip(pen, corner, text, [view.colors[group, expert] for expert in taken], font)
        top += height
    return sheet


def _legend(config, colors):
    """Lines of the colours of every expert, group by group, and of what stands for several experts and for none."""
    groups = [
        [
            (None, f"{group} experts:"),
            *(([colors[group, expert]], str(expert)) for expert in range(config.group_num_experts(group))),
        ]
        for group in config.expert_groups
    ]
    return [*groups, [([], "no routed expert"), (list(PALETTE[:2]), "several experts, best gate first")]]


def _place_chips(pieces, font):
    """(place in the sequence, text, x, y) of each text token, in lines as wide as an image."""
    placed, x, y = [], 0, 0
    for place, piece in enumerate(pieces):
        if piece is None:
            continue
        text = printable(piece).strip("<|>") or "_"
        chip = int(font.getlength(text)) + 8
        if x and x + chip > SIDE:
            x, y = 0, y + CHIP_HEIGHT
        placed.append((place, text, x, y))
        x += chip + 3
    return placed


def _draw_chip(pen, corner, text, colors, font):
    left, top = corner
    right, bottom = left + int(font.getlength(text)) + 7, top + CHIP_HEIGHT - 4
    # the letters stay black on white, the experts are a band beneath
    pen.rectangle((left, top, right, bottom), fill="#f2f2f2")
    fill_stripes(pen, (left, bottom - 5, right, bottom), colors)
    pen.text((left + 4, top - 1), text, fill=TEXT_COLOR, font=font)
