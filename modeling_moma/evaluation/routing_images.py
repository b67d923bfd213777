# SPDX-License-Identifier: Apache-2.0
"""Which expert took which token of one sequence, layer by layer, and the colours in which images show it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw

from ..calibration.observation import RouterRecord, has_routers, observed_routers, router_place
from ..errors_moma import InputError
from ..modeling_moma import MomaForCausalLM
from ..token_groups_moma import token_modalities


# colours far apart for colour-blind eyes, and from the grey of uncovered tokens
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc3311", "#ee82c8", "#66ccee", "#8b5fbf", "#c8d22e",
    "#7a4a1e", "#003f5c", "#ff8f7a", "#2fd3a5",
)  # fmt: skip
UNCOVERED = "#b4b4b4"
# the share of the image in a patch, and the grey that stands for its black: experts keep their colours
IMAGE_SHARE, DARKEST = 0.3, 110


@dataclass
class RoutedTokens:
    """The experts of each of `T` tokens in each of `L` layers."""

    groups: list[str]
    experts: list[list[list[int]]]
    skipped: list[list[bool]]


@torch.no_grad()
def record_routing(model: MomaForCausalLM, input_ids: torch.Tensor) -> RoutedTokens:
    """Run one sequence through a model in its causal routing, and record which expert took which token."""
    if model.training:
        raise InputError("`model` is in training mode, whose routing may see the future: call `model.eval()` first.")
    config = model.config
    group_of = {modality: group for group, members in config.expert_groups.items() for modality in members}
    groups = [group_of[config.modalities[index]] for index in token_modalities(config, input_ids).tolist()]
    singles = {group for group in config.expert_groups if config.group_num_experts(group) == 1}
    experts = [[[0] if group in singles else [] for group in groups] for _ in range(config.num_hidden_layers)]
    skipped = [[False] * len(groups) for _ in range(config.num_hidden_layers)]

    def observe(record: RouterRecord):
        layer, group = router_place(record.name)
        if group is None:
            skipped[layer] = (~record.is_taken_NS.squeeze(1)).tolist()
            return
        # a depth layer asks its depth router first, and its experts see what that has chosen
        places = [place for place, name in enumerate(groups) if name == group and not skipped[layer][place]]
        order_NS = record.scores_NS.argsort(dim=1, descending=True, stable=True)
        for place, order, taken in zip(places, order_NS.tolist(), record.is_taken_NS.tolist(), strict=True):
            experts[layer][place] = [expert for expert in order if taken[expert]]

    inputs = {"input_ids": input_ids[None].to(model.device), "use_cache": False}
    if has_routers(config):
        with observed_routers(model, observe):
            model(**inputs)
    for layer, marks in enumerate(skipped):
        for place in (place for place, is_skipped in enumerate(marks) if is_skipped):
            experts[layer][place] = []
    return RoutedTokens(groups, experts, skipped)


def token_pieces(processor, input_ids: torch.Tensor) -> list[str | None]:
    """Return the text of each token of `[T]`, `None` where it is an image code."""
    codes = range(processor.image_token_offset, processor.image_token_offset + processor.codebook_size)
    return [None if token in codes else processor.tokenizer.decode([token]) for token in input_ids.tolist()]


def expert_colors(config) -> dict[tuple[str, int], str]:
    """Return a colour for each (group, expert); the groups share none as long as the palette lasts."""
    pairs = [(group, expert) for group in config.expert_groups for expert in range(config.group_num_experts(group))]
    return {pair: PALETTE[number % len(PALETTE)] for number, pair in enumerate(pairs)}


def fill_stripes(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colors: Sequence[str]):
    """Draw upright stripes of equal width, grey where there is no colour."""
    left, top, right, bottom = box
    colors = colors or [UNCOVERED]
    step = (right + 1 - left) / len(colors)
    for index, color in enumerate(colors):
        pen.rectangle((left + round(index * step), top, left + round((index + 1) * step) - 1, bottom), fill=color)


def shaded(colors: Image.Image, image: Image.Image) -> Image.Image:
    """Return colours through which an image of the same size shows, in grey."""
    grey = image.convert("L").point([DARKEST + value * (255 - DARKEST) // 255 for value in range(256)])
    return Image.blend(colors, grey.convert("RGB"), IMAGE_SHARE)
