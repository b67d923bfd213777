# SPDX-License-Identifier: Apache-2.0
"""Layers of the routing as a visitor sees them: against what was recorded, for every kind of model."""

import html
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ImageColor

from helpers.tiny import noise_images, tiny_model, tiny_processor
from modeling_moma.demo.routing_view import SIDE, RoutingView
from modeling_moma.demo.studio import DemoSession
from modeling_moma.evaluation.routing_images import IMAGE_SHARE, UNCOVERED


GROUPED = {"num_experts": {"text": 3, "image": 3}}
MODELS = {
    "4t4i": GROUPED,
    "token_choice": {**GROUPED, "inference_routing": "token_choice"},
    "8x": {"num_experts": 4},
    "1t1i": {"num_experts": {"text": 1, "image": 1}},
    "dense": {"num_experts": 1},
    "depth": {**GROUPED, "depth_layers": [1], "depth_capacity": 0.5},
    "dense depth": {"num_experts": 1, "depth_layers": [1], "depth_capacity": 0.5},
}


def routed_example(**fields):
    # wide enough for routers to tell tokens apart
    model = tiny_model(tiny_processor(), initializer_range=0.5, **fields)
    for layer in model.model.layers:
        if hasattr(layer, "depth_router"):
            layer.depth_router.threshold.fill_(0.5)
    studio = DemoSession(model, tiny_processor(), "tiny")
    return studio, studio.route(noise_images(1)[0], "red <b>apple")


def hue(pixel) -> tuple:
    """A colour without its darkness, as far as blending with grey leaves it."""
    channels = np.asarray(pixel, dtype=float)
    return tuple(channels - channels.mean())


@pytest.mark.parametrize("fields", MODELS.values(), ids=list(MODELS))
def test_patches_and_words_have_the_colours_of_their_experts(fields):
    studio, example = routed_example(**fields)
    view, routed = RoutingView(studio.model.config), example.routed
    places = [place for place, piece in enumerate(example.pieces) if piece is None]
    assert len(places) == 16
    for layer in range(2):
        image = view.image(example, layer)
        assert image.size == (SIDE, SIDE)
        for index, place in enumerate(places):
            # the left edge of the patch, beside numbers and lines
            pixel = image.getpixel((index % 4 * SIDE // 4 + 2, index // 4 * SIDE // 4 + 6))
            experts = routed.experts[layer][place]
            color = view.colors[routed.groups[place], experts[0]] if experts else UNCOVERED
            expected = (1 - IMAGE_SHARE) * np.asarray(hue(ImageColor.getrgb(color)))
            assert np.allclose(hue(pixel), expected, atol=2), (layer, place)
        chips = re.findall(
            r'<span class="moma-word" style="(.*?)" title="(.*?)">(.*?)</span>', view.words(example, layer)
        )
        words = [place for place, piece in enumerate(example.pieces) if piece is not None]
        assert len(chips) == len(words)
        for place, (style, title, _) in zip(words, chips, strict=True):
            shown = [view.colors[routed.groups[place], expert] for expert in routed.experts[layer][place]]
            if routed.skipped[layer][place]:
                assert "repeating-linear-gradient" in style and "left it" in title
            else:
                assert re.findall(r"(#[0-9a-f]{6}) ", style) == (shown or [UNCOVERED])


def test_layers_differ_and_the_legend_counts_what_was_taken():
    studio, example = routed_example(**GROUPED)
    view = RoutingView(studio.model.config)
    assert not np.array_equal(view.image(example, 0), view.image(example, 1))
    for layer in range(2):
        legend = view.legend(example, layer)
        assert f"Layer {layer + 1} of 2" in legend
        for group in ("text", "image"):
            taken = [
                experts for experts, name in zip(example.routed.experts[layer], example.routed.groups) if name == group
            ]
            line = re.search(rf"<div>{'Text' if group == 'text' else 'Patches'} \((\d+) tokens\): (.*?)</div>", legend)
            assert int(line[1]) == len(taken)
            counts = [int(count) for count in re.findall(r"</span>(?:expert \d|none): (\d+)", line[2])]
            assert counts == [sum(expert in experts for experts in taken) for expert in range(3)] + [taken.count([])]


def test_a_dense_model_and_a_depth_layer_say_what_they_are():
    studio, example = routed_example(num_experts=1)
    legend = RoutingView(studio.model.config).legend(example, 0)
    assert "one network for all" in legend and "nothing to choose" in legend and "depth" not in legend
    studio, example = routed_example(**MODELS["depth"])
    view = RoutingView(studio.model.config)
    skipped = sum(example.routed.skipped[1])
    assert 0 < skipped < len(example.pieces), "the example has to tell them apart"
    assert f"it left {skipped} of {len(example.pieces)} tokens" in view.legend(example, 1)
    assert "depth" not in view.legend(example, 0)


def test_words_alone_have_no_image_and_their_characters_are_escaped():
    studio, _ = routed_example(**GROUPED)
    example = studio.route(None, "red <b>apple")
    view = RoutingView(studio.model.config)
    assert view.image(example, 0) is None
    shown = re.sub(r"<span[^>]*>|</span>|<div[^>]*>|</div>", "", view.words(example, 0))
    assert "<" not in shown and "&lt;" in shown
    # no chip of a text's characters loses some, and special tokens lose their marks
    pieces = ["<bos>", " ->", "<=", "|", " ", "<|end_image|>"]
    shown = view.words(replace(example, pieces=pieces), 0)
    words = [html.unescape(word) for word in re.findall(r"<span[^>]*>(.*?)</span>", shown)]
    assert words == ["bos", "->", "<=", "|", "\u00b7", "end_image"]


def test_an_image_alone_is_routed_with_its_caption_and_nothing_at_all_is_refused():
    studio, _ = routed_example(**GROUPED)
    image = noise_images(1)[0]
    caption = studio.caption(image)
    example = studio.route(image, "  ")
    end = example.pieces.index("<|end_image|>")
    tokenizer = studio.processor.tokenizer
    tokens = tokenizer(caption, add_special_tokens=False)["input_ids"]
    assert example.pieces[end + 1 :] == [tokenizer.decode([token]) for token in tokens]
    with pytest.raises(ValueError, match="image or words"):
        studio.route(None, " ")
    assert torch.is_grad_enabled()
