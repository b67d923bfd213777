# SPDX-License-Identifier: Apache-2.0
"""Tiny models to be served by vLLM, and what `generate` answers."""

from dataclasses import dataclass
from pathlib import Path

import torch

from helpers.tiny import noise_images, randomize_auxiliary, tiny_model


SHARED = {"shared_expert_intermediate_size": {"text": 16, "image": 16}}
TOKEN_CHOICE = {"training_routing": "token_choice", "inference_routing": "token_choice"}
CONFIGURATIONS = {
    "dense": {"num_experts": 1},
    "8x": {"num_experts": 8, "num_experts_per_tok": 2, **TOKEN_CHOICE},
    "1t1i": {"num_experts": {"text": 1, "image": 1}, "norm_placement": "post"},
    "4t4i, token choice": {**SHARED, **TOKEN_CHOICE},
    "4t4i, threshold": {**SHARED, "num_key_value_heads": 1},
    "2t6i": {"num_experts": {"text": 2, "image": 6}, "expert_intermediate_size": {"image": 16}},
    "auxiliary": {"auxiliary_routers": True, "inference_routing": "auxiliary"},
    "pre-norm": {"norm_placement": "pre", "qk_norm": "rmsnorm", "tie_word_embeddings": True},
    "post-norm": {"norm_placement": "post", "qk_norm": "layernorm_per_head", "gate_after_norm": True},
}
NEW_TOKENS = 12


@dataclass
class Answer:
    """A prompt, its mode, and the new ids of greedy `generate`."""

    prompt: list[int]
    mode: str
    ids: list[int]


def served_model(processor, **fields):
    """A model of attention heads that vLLM's CPU kernels know, with cuts that some tokens pass and some do not."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2, "initializer_range": 0.2}
    model = tiny_model(processor, **{**sizes, **fields})
    randomize_auxiliary(model)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("router.threshold"):
            buffer.copy_(0.5 + 0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def prompts(processor) -> list[list[int]]:
    """Eight: words, images, and both in either order."""
    noise = noise_images(3)
    texts = ["noto: red apple", "castle", "<image>", "<image>noto", "a fish<image>", "<image>red<image>"]
    texts += ["fluent 3d: " * 6, "x"]
    taken = iter([*noise, *noise])
    rows = []
    for text in texts:
        images = [next(taken) for _ in range(text.count("<image>"))]
        rows.append(processor(images=images or None, text=[text])["input_ids"][0])
    return rows


def greedy(model, prompt: list[int], mode: str = "text", new_tokens: int | None = NEW_TOKENS, **kwargs) -> Answer:
    """One row by itself."""
    ids = model.generate(
        torch.tensor([prompt]), generation_mode=mode, do_sample=False, max_new_tokens=new_tokens, **kwargs
    )
    return Answer(prompt, mode, ids[0, len(prompt) :].tolist())


def save(model, processor, folder: Path, name: str, with_processor: bool = True) -> Path:
    """A folder of weights, configuration and processor, without code."""
    folder = folder / name.replace(" ", "_")
    model.save_pretrained(folder)
    (processor if with_processor else processor.tokenizer).save_pretrained(folder)
    for source in folder.glob("*.py"):
        source.unlink()
    return folder
