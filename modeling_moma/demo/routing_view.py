# SPDX-License-Identifier: Apache-2.0
"""One layer of the routing of one sequence: patches and words in the colours of their experts."""

import html
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..evaluation.routing_images import UNCOVERED, RoutedTokens, expert_colors, fill_stripes, shaded


# such as `<bos>` and `<|end_image|>`, but no arrow of a text
SPECIAL = re.compile(r"<\|?(\w+)\|?>")
SIDE = 384
SKIPPED = "#ffffff"
# patches narrower than this are too small for a number
LEAST_PATCH = 30
NUMBER_SIZE = 15
CHIP = "display:inline-block;padding:2px 6px 8px;border-radius:4px;color:#111;white-space:pre;"
SWATCH = "display:inline-block;width:14px;height:14px;border-radius:3px;vertical-align:-2px;margin-right:4px;"
# the background for a token that the layer left out
CROSSED = "repeating-linear-gradient(45deg,#ffffff 0 4px,#8a8a8a 4px 6px)"


@dataclass
class RoutedExample:
    """A sequence of `T` tokens, and the experts of each."""

    image: Image.Image | None
    pieces: list[str | None]
    routed: RoutedTokens


class RoutingView:
    """Draws layers of routed examples of one model."""

    def __init__(self, config: Any):
        self.config = config
        self.colors = expert_colors(config)

    def image(self, example: RoutedExample, layer: int) -> Image.Image | None:
        """Return the image with every patch in the colours and numbers of its experts; `None` without an image."""
        if example.image is None:
            return None
        routed = example.routed
        places = [place for place, piece in enumerate(example.pieces) if piece is None]
        # a code stands for a square of pixels
        columns = round(math.sqrt(len(places) * example.image.width / example.image.height))
        rows = len(places) // columns
        patch = SIDE / max(rows, columns)
        lefts = [round(index * patch) for index in range(columns + 1)]
        tops = [round(index * patch) for index in range(rows + 1)]
        size = (lefts[-1], tops[-1])
        overlay = Image.new("RGB", size, UNCOVERED)
        boxes = {}
        for index, place in enumerate(places):
            row, column = divmod(index, columns)
            boxes[place] = (lefts[column], tops[row], lefts[column + 1] - 1, tops[row + 1] - 1)
            colors = [SKIPPED] if routed.skipped[layer][place] else self._colors_of(routed, layer, place)
            fill_stripes(ImageDraw.Draw(overlay), boxes[place], colors)
        blended = shaded(overlay, example.image.resize(size, Image.Resampling.NEAREST))
        pen, font = ImageDraw.Draw(blended), ImageFont.load_default(NUMBER_SIZE)
        for place, (left, top, right, bottom) in boxes.items():
            if routed.skipped[layer][place]:
                pen.line((left, bottom, right, top), fill="#8a8a8a", width=2)
            elif self.config.group_num_experts(routed.groups[place]) > 1 and right - left >= LEAST_PATCH:
                text = " ".join(map(str, routed.experts[layer][place][:3]))
                center = ((left + right) / 2, (top + bottom) / 2)
                pen.text(center, text, fill="#111", font=font, anchor="mm", stroke_width=2, stroke_fill="white")
        for left in lefts[1:-1]:
            pen.line((left, 0, left, size[1]), fill="white")
        for top in tops[1:-1]:
            pen.line((0, top, size[0], top), fill="white")
        return blended

    def words(self, example: RoutedExample, layer: int) -> str:
        """Return HTML of the text tokens of a sequence, each with a band in the colours of its experts."""
        chips = [
            self._chip(example.routed, layer, place, piece)
            for place, piece in enumerate(example.pieces)
            if piece is not None
        ]
        return f'<div class="moma-words">{"".join(chips)}</div>'

    def legend(self, example: RoutedExample, layer: int) -> str:
        """Return HTML that says which layer it is, whose colour is whose, and how many tokens each expert took."""
        routed = example.routed
        lines = [f"<b>Layer {layer + 1} of {self.config.num_hidden_layers}</b>"]
        lines += [self._legend_line(routed, layer, group) for group in self.config.expert_groups]
        if layer in (self.config.depth_layers or ()):
            lines.append(
                f"<div>{_swatch(CROSSED)}This is a depth layer: it left {sum(routed.skipped[layer])} of "
                f"{len(routed.groups)} tokens as they came.</div>"
            )
        processed = [experts for experts, is_out in zip(routed.experts[layer], routed.skipped[layer]) if not is_out]
        if any(len(experts) != 1 for experts in processed):
            lines.append("<div>A token may have several experts, best first, or none.</div>")
        return f'<div class="moma-legend">{"".join(lines)}</div>'

    def _legend_line(self, routed: RoutedTokens, layer: int, group: str) -> str:
        name = {"all": "All tokens", "image": "Patches"}.get(group, html.escape(group.capitalize()))
        places = [place for place, other in enumerate(routed.groups) if other == group]
        processed = [routed.experts[layer][place] for place in places if not routed.skipped[layer][place]]
        num_experts = self.config.group_num_experts(group)
        if num_experts == 1:
            swatch = _swatch(self.colors[group, 0])
            return f"<div>{name}: {swatch}one network for all {len(processed)}, nothing to choose.</div>"
        taken = Counter(expert for experts in processed for expert in experts)
        entries = [
            f"{_swatch(self.colors[group, expert])}expert {expert}: {taken[expert]}" for expert in range(num_experts)
        ]
        has_shared = self.config.common_shared_intermediate_size or self.config.group_shared_intermediate_size(group)
        rest = "only the shared expert" if has_shared else "none"
        entries.append(f"{_swatch(UNCOVERED)}{rest}: {processed.count([])}")
        return f"<div>{name} ({len(places)} tokens): {' &nbsp; '.join(entries)}</div>"

    def _colors_of(self, routed: RoutedTokens, layer: int, place: int) -> list[str]:
        return [self.colors[routed.groups[place], expert] for expert in routed.experts[layer][place]]

    def _chip(self, routed: RoutedTokens, layer: int, place: int, piece: str) -> str:
        colors = self._colors_of(routed, layer, place) or [UNCOVERED]
        # upright stripes
        step = 100 / len(colors)
        stops = [f"{color} {index * step:.1f}% {(index + 1) * step:.1f}%" for index, color in enumerate(colors)]
        band = f"linear-gradient(to right,{','.join(stops)})"
        title = ", ".join(f"expert {expert}" for expert in routed.experts[layer][place]) or "no expert"
        if routed.skipped[layer][place]:
            band, title = CROSSED, "the layer left it as it came"
        elif self.config.group_num_experts(routed.groups[place]) == 1:
            title = "one network, nothing to choose"
        # no space before it and no marks of special tokens; spaces alone as dots
        text = piece.strip()
        special = SPECIAL.fullmatch(text)
        text = special[1] if special else text or piece.replace(" ", "\u00b7").replace("\n", "\u21b5")
        # a wider gap where a word begins
        margin = "2px 2px 2px 10px" if piece.startswith(" ") else "2px"
        style = f"{CHIP}margin:{margin};background:{band} bottom/100% 6px no-repeat,#f2f2f2;"
        return f'<span class="moma-word" style="{style}" title="token {place + 1}: {title}">{html.escape(text)}</span>'


def _swatch(color: str) -> str:
    return f'<span style="{SWATCH}background:{color}"></span>'
