# SPDX-License-Identifier: Apache-2.0
"""Tiny parts that several test files build on: real classes, random weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image

from modeling_moma import MomaConfig, MomaForCausalLM
from modeling_moma.data.encoding import DocumentEncoder, processor_fingerprint
from modeling_moma.data.kinds import CaptionDocuments
from modeling_moma.data.sources import read_sources
from modeling_moma.routing_moma import MomaAuxiliaryRouter
from tokenization import (
    MomaImageProcessor,
    MomaProcessor,
    MomaVQConfig,
    MomaVQModel,
    add_image_tokens,
    train_text_tokenizer,
)


# a model that trains in seconds
TRAINED = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
IMAGE_IDS = (8, 24)
# `moma push` asks for a license
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


def noise_images(count: int, side: int = 16) -> list[Image.Image]:
    """Images that all differ."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def tiny_vq_model(side: int = 16, codes: int = 32) -> MomaVQModel:
    """An image tokenizer of four pixels a code."""
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
    """A processor of images of `side` pixels and `(side / 4) ** 2` codes."""
    image_processor = MomaImageProcessor.for_resolution(side)
    tokenizer = add_image_tokens(train_text_tokenizer(TEXTS * 3, vocab_size=300), codes)
    return MomaProcessor(image_processor, tokenizer, tiny_vq_model(side, codes))


# captions of `data/emoji`, as its recipe has them
CAPTIONS = {
    "data": "nowhere",
    "image": "image",
    "text": "{style}: {label}",
    "alternatives": [{"text": "{style} tags: {keywords}", "share": 0.25}],
}


def tiny_rows(
    processor: MomaProcessor, count: int, codings: int = 1, seed: int = 0, labels: Sequence[str] = ()
) -> list[dict]:
    """Rows of captions with random codes, and with labels in turn where some are given."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, processor.codebook_size, (count, codings, processor.image_seq_length))
    names = [labels[index % len(labels)] if labels else f"thing {index}" for index in range(count)]
    return [
        {"codes": codes[index], "style": "noto", "label": names[index], "keywords": ["red", "fruit"]}
        for index in range(count)
    ]


def tiny_documents(processor: MomaProcessor, count: int, *args, **kwargs) -> CaptionDocuments:
    """Documents of [`tiny_rows`]."""
    kind = read_sources({"emoji": CAPTIONS})[0].kind
    rows = tiny_rows(processor, count, *args, **kwargs)
    return CaptionDocuments.from_rows("emoji", kind, rows, DocumentEncoder(processor))


def write_tokens(
    folder: Path,
    processor: MomaProcessor,
    codings: int = 1,
    packed: bool = False,
    labels: Sequence[str] = (),
    **splits: int,
):
    """What `moma tokenize` writes, with random codes: so many captions in each split, training codings apart."""
    entry: dict = {"fields": CAPTIONS, "read": {}, "splits": {}}
    (folder / "emoji").mkdir(parents=True)
    for seed, (name, count) in enumerate(splits.items()):
        rows = tiny_rows(processor, count, codings if name == "train" else 1, seed, labels)
        table = [{**row, "row": index, "codes": row["codes"].flatten()} for index, row in enumerate(rows)]
        length = len(table[0]["codes"]) if table else processor.image_seq_length
        texts = {"style": Value("string"), "label": Value("string"), "keywords": List(Value("string"))}
        features = Features({"row": Value("int64"), "codes": List(Value("uint16"), length=length), **texts})
        file = f"emoji/{name}-00000-of-00001.arrow"
        with ArrowWriter(path=str(folder / file), features=features) as writer:
            for row in table:
                writer.write(row)
            writer.finalize()
        entry["splits"][name] = {"documents": count, "files": [file]}
    manifest = {
        "fingerprint": processor_fingerprint(processor),
        "sequence_length": 64,
        "packed": packed,
        "sources": {"emoji": entry},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_training(folder: Path, codings: int = 1, **fields) -> MomaProcessor:
    """What a pre-training needs at its smallest: `processor`, `tokens`, and `recipe.json` of a model with `fields`."""
    processor = tiny_processor()
    processor.save_pretrained(folder / "processor")
    write_tokens(folder / "tokens", processor, codings=codings, train=12, validation=4)
    (folder / "recipe.json").write_text(json.dumps({"model": {**TRAINED, **fields}}))
    return processor


def trainer_flags(**fields) -> list[str]:
    """The flags that set fields of a recipe's section `trainer`."""
    return [text for name, value in fields.items() for text in ("--set", f"trainer.{name}={value}")]


def four_steps(folder: Path, output: Path, recipe: str, *more: str) -> list[str]:
    """Arguments of `moma pretrain` on what [`write_training`] wrote, with a recipe beside it."""
    paths = [text for name in ("processor", "tokens") for text in (f"--{name}", str(folder / name))]
    sizes = trainer_flags(
        max_steps=4, per_device_train_batch_size=4, eval_steps=4, save_steps=2, logging_steps=1, bf16=False
    )
    return [*paths, str(folder / f"{recipe}.json"), "--output", str(output), *sizes, *more]


def logged_losses(output: Path) -> list[float]:
    """The losses in the log of a finished training."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [log["loss"] for log in history if "loss" in log]


def tiny_config(**kwargs) -> MomaConfig:
    """A configuration of some thousand parameters: 40 ids, of which 8 to 23 are image codes."""
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


def left_padding(ids: torch.Tensor, *lengths: int) -> torch.Tensor:
    """An attention mask of ids, 0 at the first positions of rows, so many each."""
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 0
    return mask
