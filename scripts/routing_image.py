# SPDX-License-Identifier: Apache-2.0
"""Which expert took which token: recorded from one forward of a model, and drawn over images and captions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from modeling_moma.evaluation.routing_images import (
    PALETTE,
    UNCOVERED,
    expert_colors,
    fill_stripes,
    record_routing,
    shaded,
    token_pieces,
)
from sheet import BACKGROUND, FAINT_COLOR, GAP, MARGIN, TEXT_COLOR, printable


IMAGE_SIDE = 192
CHIP_HEIGHT = 26
LINE_HEIGHT = 22
FONT_SIZE = 15


@dataclass
class RoutedExample:
    """One sequence with an image and words, and the experts of each of its tokens.

    Attributes:
        image: the image whose codes stand in the sequence.
        pieces: the text of each token, `None` where it is an image code; `[T]`.
        groups: the expert group of each token, `[T]`.
        experts: by layer and token the experts that took it, best gate first; `[L][T][*]`.
    """

    image: Image.Image
    pieces: list[str | None]
    groups: list[str]
    experts: list[list[list[int]]]


def route_example(model: torch.nn.Module, processor, image: Image.Image, caption: str) -> RoutedExample:
    """
    Records the routing of `<bos> image caption`.

    Args:
        model: in `eval()` mode.
        processor: gives ids, and reads them back.
        image: the image.
        caption: its caption.
    """
    ids = processor(images=[image], text=[f"{processor.image_token}{caption}"], return_tensors="pt")["input_ids"][0]
    routed = record_routing(model, ids)
    return RoutedExample(image, token_pieces(processor, ids), routed.groups, routed.experts)


def shown_layers(num_layers: int) -> list[int]:
    """First, middle and last layer, each once."""
    return sorted({0, (num_layers - 1) // 2, num_layers - 1})


def draw_routing(examples: Sequence[RoutedExample], config) -> Image.Image:
    """
    Draws each example as a row: the image, then for the first, the middle and the last layer the image with each
    patch in the colours of its experts, and the caption's tokens in theirs.

    Args:
        examples: at least one, of models of one configuration.
        config: gives groups and layers.

    Returns:
        An RGB image.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("`examples` is empty: at least one is needed.")
    font = ImageFont.load_default(FONT_SIZE)
    colors = expert_colors(config)
    layers = shown_layers(config.num_hidden_layers)
    width = 2 * MARGIN + (len(layers) + 1) * (IMAGE_SIDE + MARGIN) - MARGIN
    chips = [_place_chips(example, font, IMAGE_SIDE) for example in examples]
    heights = [
        LINE_HEIGHT + IMAGE_SIDE + GAP + max(y + CHIP_HEIGHT for _, _, y, _ in placed) + MARGIN for placed in chips
    ]
    legend = _draw_legend(config, colors, width, font)
    sheet = Image.new("RGB", (width, legend.height + sum(heights)), BACKGROUND)
    sheet.paste(legend, (0, 0))
    pen = ImageDraw.Draw(sheet)
    top = legend.height
    for example, placed, height in zip(examples, chips, heights, strict=True):
        image = example.image.convert("RGB").resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.NEAREST)
        pen.text((MARGIN, top), "image", fill=FAINT_COLOR, font=font)
        sheet.paste(image, (MARGIN, top + LINE_HEIGHT))
        for column, layer in enumerate(layers, start=1):
            left = MARGIN + column * (IMAGE_SIDE + MARGIN)
            pen.text((left, top), f"layer {layer + 1} of {config.num_hidden_layers}", fill=TEXT_COLOR, font=font)
            sheet.paste(_draw_patches(example, layer, image, colors), (left, top + LINE_HEIGHT))
            for place, x, y, text in placed:
                box = (left + x, top + LINE_HEIGHT + IMAGE_SIDE + GAP + y)
                chosen = [colors[example.groups[place], expert] for expert in example.experts[layer][place]]
                _draw_chip(sheet, box, text, chosen, font)
        top += height
    return sheet


def _place_chips(example, font, width):
    """(place in the sequence, x, y, text) of each text token, in lines of at most `width` pixels."""
    placed, x, y = [], 0, 0
    for place, piece in enumerate(example.pieces):
        if piece is None:
            continue
        text = printable(piece).strip("<|>") or "_"
        chip = min(width, int(font.getlength(text)) + 8)
        if x and x + chip > width:
            x, y = 0, y + CHIP_HEIGHT
        placed.append((place, x, y, text))
        x += chip + 3
    return placed


def _draw_patches(example, layer, image, colors):
    """The image with every patch in the colours of its experts: in halves or stripes where several took it."""
    places = [place for place, piece in enumerate(example.pieces) if piece is None]
    grid = math.isqrt(len(places))
    overlay = Image.new("RGB", image.size, UNCOVERED)
    pen = ImageDraw.Draw(overlay)
    edges = [round(index * IMAGE_SIDE / grid) for index in range(grid + 1)]
    for index, place in enumerate(places):
        row, column = divmod(index, grid)
        box = (edges[column], edges[row], edges[column + 1] - 1, edges[row + 1] - 1)
        fill_stripes(pen, box, [colors[example.groups[place], expert] for expert in example.experts[layer][place]])
    blended = shaded(overlay, image)
    pen = ImageDraw.Draw(blended)
    for edge in edges[1:-1]:
        pen.line((edge, 0, edge, IMAGE_SIDE), fill=BACKGROUND)
        pen.line((0, edge, IMAGE_SIDE, edge), fill=BACKGROUND)
    return blended


def _draw_chip(sheet, corner, text, colors, font):
    pen = ImageDraw.Draw(sheet)
    left, top = corner
    right, bottom = left + int(font.getlength(text)) + 7, top + CHIP_HEIGHT - 4
    # the letters stay black on white, the experts are a band beneath
    pen.rectangle((left, top, right, bottom), fill="#f2f2f2")
    fill_stripes(pen, (left, bottom - 5, right, bottom), colors)
    pen.text((left + 4, top - 1), text, fill=TEXT_COLOR, font=font)


def _draw_legend(config, colors, width, font):
    """Title, the colour of every expert group by group, and the marks of several experts and of none."""
    shared = config.common_shared_intermediate_size or any(
        map(config.group_shared_intermediate_size, config.expert_groups)
    )
    lines = [
        [
            (None, f"{name} experts:"),
            *(([colors[name, expert]], str(expert)) for expert in range(config.group_num_experts(name))),
        ]
        for name in config.expert_groups
    ]
    lines.append(
        [
            ([], "no expert" + (", only the shared one" if shared else "")),
            (list(PALETTE[:2]), "several experts, best gate first"),
        ]
    )
    legend = Image.new("RGB", (width, 2 * MARGIN + LINE_HEIGHT * (len(lines) + 1) + GAP), BACKGROUND)
    pen = ImageDraw.Draw(legend)
    pen.text((MARGIN, MARGIN), "Which expert took which token", fill=TEXT_COLOR, font=font)
    for number, line in enumerate(lines):
        x, y = MARGIN, MARGIN + GAP + (number + 1) * LINE_HEIGHT
        for swatch, text in line:
            if swatch is not None:
                fill_stripes(pen, (x, y + 2, x + 15, y + 17), swatch)
                x += 21
            pen.text((x, y), text, fill=TEXT_COLOR, font=font)
            x += int(font.getlength(text)) + 16
    return legend
