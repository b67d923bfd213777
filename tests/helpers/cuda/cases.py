# SPDX-License-Identifier: Apache-2.0
"""The models whose launches and waits are counted, of one size: 8 layers, 64 wide, 4 rows of 128 tokens, in bf16."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from helpers.cuda.device import Counts, PretendedCuda, RealCuda
from modeling_moma import MomaConfig, MomaForCausalLM


SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
TOKENS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
CODES, BEGIN, END, LENGTH = (256, 512), 4, 5, 16
MODALITIES = {
    "modality_token_ranges": {"image": [list(CODES)]},
    "image_seq_length": LENGTH,
    "begin_image_token_id": BEGIN,
    "end_image_token_id": END,
}
# as in Llama and OLMoE
PRE = {"norm_placement": "pre", "qk_norm": "rmsnorm"}
TOKEN_CHOICE = {"training_routing": "token_choice", "inference_routing": "token_choice"}
# the prompt of a generation, and after how many tokens two of them end, whose difference is counted
PROMPT, ENDS = 16, (3, 7)
PARTS = ("forward", "backward", "growing", "static")


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=4))


def olmoe() -> nn.Module:
    config = OlmoeConfig(**SIZES, **TOKENS, num_key_value_heads=4, num_experts=8, num_experts_per_tok=1)
    model = OlmoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def moma(**fields) -> nn.Module:
    groups = {"num_experts": {"text": 4, "image": 4}}
    return MomaForCausalLM(MomaConfig(**{**SIZES, **MODALITIES, **PRE, **groups, **fields}))


@dataclass(frozen=True)
class Case:
    """A model to count.

    Args:
        build: makes it.
        is_autocast: its weights are in fp32, and a training step runs under autocast to bf16; it does not generate.
        rows: of a decoding step.
    """

    build: Callable[[], nn.Module]
    is_autocast: bool = False
    rows: int = 2

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[:2] if self.is_autocast else PARTS


THRESHOLD = {"training_routing": "threshold", "routing_warmup_steps": 0}
DEPTH = {"depth_layers": [1, 3, 5, 7], "depth_capacity": 0.25}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": llama,
    "OLMoE": olmoe,
    "dense": partial(moma, num_experts=1),
    "1t1i": partial(moma, num_experts={"text": 1, "image": 1}),
    "4t4i": moma,
    "8x": partial(moma, num_experts=8),
    "4t4i token choice": partial(moma, **TOKEN_CHOICE),
    "4t4i threshold": partial(moma, **THRESHOLD),
    "4t4i shared expert": partial(moma, shared_expert_intermediate_size={"text": 64, "image": 64}),
    "4t4i loss weights": partial(moma, modality_loss_weights={"text": 2.0, "image": 0.5}),
    "4t4i auxiliary": partial(moma, auxiliary_routers=True, inference_routing="auxiliary"),
    "4t4i depth": partial(moma, **DEPTH),
    "4t4i depth by modality": partial(moma, depth_layers=[1, 3, 5, 7], depth_capacity={"text": 0.5, "image": 0.125}),
}
CASES = {name: Case(build) for name, build in MODELS.items()}
# so many that hardly a step finds none that has chosen its token
CASES["4t4i depth, 16 rows"] = Case(MODELS["4t4i depth"], rows=16)
CASES |= {
    f"{name} autocast": Case(MODELS[name], is_autocast=True)
    for name in ("Llama", "OLMoE", "4t4i", "4t4i token choice", "4t4i threshold", "4t4i depth")
}


def token_ids(rows: int = 4, length: int = 128) -> torch.Tensor:
    """Rows of words with one image in the middle, `[rows, length]`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, CODES[0], (rows, length), generator=generator)
    first = length // 2
    ids[:, first : first + LENGTH] = torch.randint(*CODES, (rows, LENGTH), generator=generator)
    ids[:, first - 1], ids[:, first + LENGTH] = BEGIN, END
    return ids


def count(name: str, device: PretendedCuda | RealCuda, with_places: bool = False) -> Iterator[tuple[str, Counts]]:
    """The counts of a case's parts, one after the other; of a decoding step those of one of its several steps."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build()
    if not case.is_autocast:
        model = model.to(torch.bfloat16)
    trained = copy.deepcopy(model).to("cuda").train()
    ids = token_ids().to("cuda")
    precision = torch.autocast("cuda", torch.bfloat16) if case.is_autocast else contextlib.nullcontext()
    with device.counting(with_places) as forward, precision:
        loss = trained(input_ids=ids, labels=ids, use_cache=False).loss
    yield "forward", forward
    with device.counting(with_places) as backward:
        loss.backward()
    yield "backward", backward
    if case.is_autocast:
        return
    model = model.to("cuda").eval()
    caches = {"growing": {}, "static": {"cache_implementation": "static", "disable_compile": True}}
    for part, cache in caches.items():
        prompts = token_ids(case.rows)[:, :PROMPT].to("cuda")
        yield part, count_step(model, prompts, device, with_places, **cache)


def count_step(model, ids, device, with_places, **options) -> Counts:
    """The counts of one step of greedy generation."""
    found = []
    for length in ENDS:
        limits = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        with device.counting(with_places) as counts:
            model.generate(ids, attention_mask=torch.ones_like(ids), **limits, **options)
        found.append(counts)
    first, second = found
    return second.less(first).over(ENDS[1] - ENDS[0])
