# SPDX-License-Identifier: Apache-2.0
"""Tiny parts that several test files build on: real classes, random weights."""

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from PIL import Image

from modeling_moma import MomaConfig, MomaForCausalLM
from modeling_moma.auxiliary_moma import MomaAuxiliaryRouter
from tokenization import (
    MomaImageProcessor,
    MomaProcessor,
    MomaVQConfig,
    MomaVQModel,
    add_picture_tokens,
    train_text_tokenizer,
)


IMAGE_IDS = (8, 24)
# what `moma push` asks of a card at least
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: any-to-any
datasets: []
tags: [moma]
---

# A tiny model
"""
TEXTS = ["noto: red apple", "twemoji: green apple", "fluent 3d: castle", "noto tags: fruit, red"]


def noise_pictures(count: int, side: int = 16) -> list[Image.Image]:
    """Pictures that all differ."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def tiny_vq_model(side: int = 16, codes: int = 32) -> MomaVQModel:
    """A picture tokenizer of four pixels a code."""
    torch.manual_seed(0)
    config = MomaVQConfig(
        resolution=side,
        patch_size=4,
        channel_multiplier=(1,),
        base_channels=16,
        latent_channels=16,
        embed_dim=8,
        num_embeddings=codes,
        num_res_blocks=1,
        norm_type="none",
        attn_type=None,
    )
    return MomaVQModel(config)


def tiny_processor(side: int = 16, codes: int = 32) -> MomaProcessor:
    """A processor of pictures of `side` pixels and `(side / 4) ** 2` codes."""
    image_processor = MomaImageProcessor.for_resolution(side)
    tokenizer = add_picture_tokens(train_text_tokenizer(TEXTS * 3, vocab_size=300), codes)
    return MomaProcessor(image_processor, tokenizer, tiny_vq_model(side, codes))


def tiny_codes(processor: MomaProcessor, **splits: int) -> DatasetDict:
    """What `moma tokenize` writes, with random codes: so many rows in each split."""
    rng = np.random.default_rng(0)

    def rows_of(rows):
        return Dataset.from_dict(
            {
                "codes": rng.integers(0, processor.codebook_size, (rows, 1, processor.image_seq_length)).tolist(),
                "style": ["noto"] * rows,
                "label": [f"thing {index}" for index in range(rows)],
                "keywords": [["red", "fruit"]] * rows,
            }
        )

    return DatasetDict({name: rows_of(rows) for name, rows in splits.items()})


def tiny_config(**kwargs) -> MomaConfig:
    """A configuration of some thousand parameters: 40 ids, of which 8 to 23 are picture codes."""
    fields = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "modality_token_ranges": {"image": [list(IMAGE_IDS)]},
        "begin_image_token_id": 24,
        "end_image_token_id": 25,
        "image_seq_length": 4,
        # wide enough for routers to tell tokens apart
        "initializer_range": 0.3,
    }
    return MomaConfig(**{**fields, **kwargs})


def tiny_model(processor: MomaProcessor | None = None, seed: int = 0, **fields) -> MomaForCausalLM:
    """A 4t4i model of two layers with seeded weights; auxiliary routers take some tokens.

    With a processor, over its vocabulary and in eval mode; without, of `tiny_config` and in training mode.
    """
    torch.manual_seed(seed)
    if processor is None:
        model = MomaForCausalLM(tiny_config(**fields)).train()
        randomize_auxiliary(model, seed)
        return model
    defaults = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "norm_placement": "pre",
    }
    return MomaForCausalLM(MomaConfig(**{**defaults, **fields, **processor.token_layout()})).eval()


@torch.no_grad()
def randomize_auxiliary(module: torch.nn.Module, seed: int = 0):
    """Random auxiliary routers, wide enough to tell tokens apart: each takes some tokens and leaves some."""
    generator = torch.Generator().manual_seed(seed)
    for router in module.modules():
        if isinstance(router, MomaAuxiliaryRouter):
            for parameter in router.parameters():
                parameter.normal_(generator=generator)
            router.threshold.uniform_(0.3, 0.7, generator=generator)


def mixed_ids(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Ids with about as many codes as words, `[rows, length]`."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(26, 40, (rows, length), generator=generator)
    image = torch.randint(*IMAGE_IDS, (rows, length), generator=generator)
    return torch.where(torch.rand(rows, length, generator=generator) < 0.5, text, image)
