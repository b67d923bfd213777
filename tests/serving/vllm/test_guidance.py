# SPDX-License-Identifier: Apache-2.0
"""Guidance by two requests a token, with the model itself in the place of a server."""

import pytest
import torch

from helpers.served import greedy, prompts, served_model
from modeling_moma.serving.vllm import guided_frame


@pytest.fixture(scope="module")
def model(processor):
    return served_model(processor)


def asked(model):
    def ask(rows):
        with torch.no_grad():
            return [model(torch.tensor([row])).logits[0, -1].log_softmax(-1) for row in rows]

    return ask


def test_greedy_guidance_equals_generate(processor, model):
    words = prompts(processor)[0]
    begun = [*words, processor.begin_image_token_id, *processor.image_token_ids[:3]]
    drawn = set()
    for prompt in (words, begun):
        for scale in (1.0, 4.0):
            expected = greedy(model, prompt, "image", None, guidance_scale=scale)
            assert guided_frame(asked(model), model.config, prompt, scale) == expected.ids
            drawn.add(tuple(expected.ids))
    assert len(drawn) == 4


def test_sampling_follows_the_generator(processor, model):
    words = prompts(processor)[0]
    drawn = [
        guided_frame(
            asked(model), model.config, words, 2.0, temperature=1.0, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(ids) == 18 for ids in drawn)


def test_what_cannot_be_drawn_is_refused(processor, model):
    with pytest.raises(ValueError, match="`modality` must be one of \\['image'\\], got 'audio'"):
        guided_frame(asked(model), model.config, [1], 2.0, modality="audio")
    with pytest.raises(ValueError, match="`temperature` must be 0 or more, got -1"):
        guided_frame(asked(model), model.config, [1], 2.0, temperature=-1)
    with pytest.raises(ValueError, match="`prompt` has 120 tokens and the frame needs 18 more"):
        guided_frame(asked(model), model.config, [1] * 120, 2.0)
