# SPDX-License-Identifier: Apache-2.0
"""Transformers' continuous batching of models of this package."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from helpers.tiny import tiny_model, tiny_processor


@pytest.mark.parametrize("fields", [{}, {"untied_attention": True}], ids=["plain", "untied"])
def test_continuous_batching_equals_generate_for_a_model_without_depth(fields):
    processor = tiny_processor()
    model = tiny_model(processor, num_key_value_heads=2, **fields)
    image = [processor.begin_image_token_id, *processor.image_token_ids[:16], processor.end_image_token_id]
    prompts = [processor.tokenizer(text)["input_ids"] for text in ("noto: red", "castle", "fluent 3d: ca")]
    prompts[1] = prompts[1] + image
    # no grammar of images applies here
    not_words = [processor.begin_image_token_id, processor.end_image_token_id, *processor.image_token_ids]
    settings = GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0, suppress_tokens=not_words
    )
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    # a cache of all the memory there is would take its time
    small = ContinuousBatchingConfig(page_size=32, num_blocks=16, max_batch_tokens=64)
    outputs = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=small)
    assert [output.error for output in outputs.values()] == [None] * 3
    assert [outputs[name].generated_tokens for name in sorted(outputs)] == expected


def test_continuous_batching_refuses_depth_layers_by_name():
    processor = tiny_processor()
    model = tiny_model(processor, depth_layers=[0], depth_capacity=0.5)
    with pytest.raises(ValueError, match="Invalid layer type"):
        model.generate_batch([processor.tokenizer("castle")["input_ids"]])
