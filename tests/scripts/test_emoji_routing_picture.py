# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from PIL import Image, ImageColor

from emoji_recipe.routing_picture import (
    DARKEST,
    LINE_HEIGHT,
    PALETTE,
    PICTURE_SHARE,
    PICTURE_SIDE,
    UNCOVERED,
    RoutedExample,
    draw_routing,
    expert_colors,
    record_routing,
    shown_layers,
)
from emoji_recipe.sheet import MARGIN
from modeling_moma import MomaConfig, MomaForCausalLM


IDS = torch.tensor([0, 24, 8, 9, 10, 11, 25, 30, 31, 32])


def tiny_model(**kwargs):
    torch.manual_seed(0)
    config = MomaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        modality_token_ranges={"image": [[8, 24]]},
        begin_image_token_id=24,
        end_image_token_id=25,
        image_seq_length=4,
        initializer_range=0.5,
        **kwargs,
    )
    return MomaForCausalLM(config).eval()


def test_recorded_experts_are_those_whose_threshold_the_score_reaches():
    model = tiny_model(num_experts={"text": 3, "image": 2})
    groups, experts = record_routing(model, IDS)
    assert groups == ["text"] * 2 + ["image"] * 4 + ["text"] * 4
    with torch.no_grad():
        logits = model(input_ids=IDS[None], output_router_logits=True).router_logits
    sizes = set()
    for layer in range(3):
        for index, group in enumerate(model.config.expert_groups):
            router = model.model.layers[layer].mlp.groups[group].router
            scores = logits[2 * layer + index].sigmoid()
            places = [place for place, name in enumerate(groups) if name == group]
            for place, row in zip(places, scores, strict=True):
                ranked = row.argsort(descending=True).tolist()
                taken = [expert for expert in ranked if row[expert] >= router.threshold[expert]]
                assert experts[layer][place] == taken
                sizes.add(len(taken))
    # the example holds uncovered tokens, and tokens of several experts
    assert {0, 1, 2} <= sizes


def test_a_group_of_one_expert_takes_all_its_tokens_and_a_shared_group_serves_both_modalities():
    _, experts = record_routing(tiny_model(num_experts={"text": 1, "image": 1}), IDS)
    assert experts == [[[0]] * 10] * 3
    groups, experts = record_routing(tiny_model(num_experts=4, inference_routing="token_choice"), IDS)
    assert groups == ["all"] * 10
    assert all(len(chosen) == 1 for layer in experts for chosen in layer)


def test_recording_leaves_no_hook_and_refuses_a_model_in_training():
    model = tiny_model()
    record_routing(model, IDS)
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("router"))
    with pytest.raises(ValueError, match="eval"):
        record_routing(model.train(), IDS)


def routed(experts_of_codes):
    pieces = ["<bos>", "<|begin_image|>", None, None, None, None, "<|end_image|>", "red", " apple"]
    groups = ["image" if piece is None else "text" for piece in pieces]
    codes = iter(experts_of_codes)
    layer = [next(codes) if piece is None else [0] for piece in pieces]
    return RoutedExample(Image.new("RGB", (64, 64), "black"), pieces, groups, [layer] * 3)


def blended(color):
    """A patch's colour with the black picture in it."""
    channels = ImageColor.getrgb(color)
    return tuple(round((1 - PICTURE_SHARE) * channel + PICTURE_SHARE * DARKEST) for channel in channels)


def close(found, expected):
    return all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))


def test_patches_have_their_experts_colours_in_raster_order_stripes_for_several_and_grey_for_none():
    config = tiny_model(num_experts={"text": 2, "image": 3}).config
    colors = expert_colors(config)
    sheet = draw_routing([routed([[0], [], [2, 1], [1]])], config)
    # the picture itself is black: its top left corner gives the place of the row
    column = [sheet.getpixel((MARGIN + 1, y)) for y in range(sheet.height)]
    top = column.index((0, 0, 0), MARGIN + 4 * LINE_HEIGHT)
    left, quarter = MARGIN + PICTURE_SIDE + MARGIN, PICTURE_SIDE // 4
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
    colors = expert_colors(tiny_model(num_experts={"text": 4, "image": 4}).config)
    assert len(set(colors.values())) == 8
    assert UNCOVERED not in PALETTE


def test_shown_layers_are_first_middle_and_last():
    assert [shown_layers(count) for count in (1, 2, 3, 6, 24)] == [[0], [0, 1], [0, 1, 2], [0, 2, 5], [0, 11, 23]]


def test_no_example_is_refused_and_every_example_has_its_row():
    config = tiny_model(num_experts={"text": 2, "image": 3}).config
    with pytest.raises(ValueError, match="examples"):
        draw_routing([], config)
    one, two = (draw_routing([routed([[0], [], [2, 1], [1]])] * count, config) for count in (1, 2))
    assert two.height - one.height > PICTURE_SIDE
