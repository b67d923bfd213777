# SPDX-License-Identifier: Apache-2.0
"""A tiny processor that knows the words of a few captions, and a model that has begun to learn them."""

import torch
from transformers import set_seed

from helpers.tiny import noise_images, tiny_model, tiny_processor
from modeling_moma.calibration.thresholds import calibrate_thresholds
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.evaluation.measures import padded_batches
from tokenization import MomaProcessor, add_image_tokens, train_text_tokenizer


CAPTIONS = ["house (tabler)", "red apple (noto, flat)", "tags: home, building", "tags: fruit, red apple"]
IMAGES, STEPS = 3, 12


def caption_processor():
    tiny = tiny_processor()
    tokenizer = add_image_tokens(train_text_tokenizer(CAPTIONS * 3, vocab_size=300), tiny.codebook_size)
    return MomaProcessor(tiny.image_processor, tokenizer, tiny.vq_model)


def caption_model(processor, **fields):
    """A model that has taken a few steps, after which captions end and go on as they do."""
    set_seed(0)
    model = tiny_model(processor, num_experts={"text": 4, "image": 4}, initializer_range=0.3, **fields)
    encoder = DocumentEncoder(processor)
    codes = processor.encode_images(noise_images(IMAGES))
    documents = [encoder.caption(text, codes[place % IMAGES], image_first=True) for place, text in enumerate(CAPTIONS)]
    batch = padded_batches(processor, [{"input_ids": ids} for ids in documents], len(documents))[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(STEPS):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    calibrate_thresholds(model, [batch])
    return model.eval()
