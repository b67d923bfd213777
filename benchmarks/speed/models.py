# SPDX-License-Identifier: Apache-2.0
"""The models that are compared, ours and those of Transformers, by name and at any size, and the tokens they read.

All have the sizes of ours, so that a token meets as many parameters: dense ones one network in each layer, sparse ones
several networks of that size, of which each token meets one.

Shape suffixes:
    B rows, T positions.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from modeling_moma import MomaConfig, MomaForCausalLM
from modeling_moma.calibration.thresholds import calibrate_thresholds
from modeling_moma.cpu_moma import use_cpu_layers
from modeling_moma.modeling_moma import MomaAttention
from modeling_moma.planning.costs import training_flops
from modeling_moma.routing_moma import MomaRouterBase


@dataclass(frozen=True)
class Shape:
    """One size, for every architecture; of the vocabulary the last half are image codes."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    image_length: int = 64

    @property
    def first_code(self) -> int:
        """The id from which on ids are image codes."""
        return self.vocab_size // 2


SHAPES = {
    "tiny": Shape(32, 24, num_layers=2, num_heads=2, vocab_size=128, image_length=8),
    "small": Shape(256, 688, num_layers=6, num_heads=4, vocab_size=2048),
    # the width of `90m`, rounded up to what grouped products take, under a vocabulary that leaves the layers visible
    "medium": Shape(512, 1368, num_layers=8, num_heads=8, vocab_size=8192),
    "large": Shape(1024, 2736, num_layers=12, num_heads=16, vocab_size=8192),
    # the model of recipes/icons.yaml, as small as a study of many runs wants it
    "study": Shape(128, 128, num_layers=4, num_heads=4, vocab_size=5024),
    "90m": Shape(512, 1368, num_layers=8, num_heads=8, vocab_size=65536),
}
# experts of a sparse peer, by each of its implementations
NUM_EXPERTS = 8
OLMOE = ("olmoe eager", "olmoe batched_mm", "olmoe grouped_mm")
EXPERTS = {
    "dense": 1,
    "1t1i": {"text": 1, "image": 1},
    "4t4i": {"text": 4, "image": 4},
    "16t16i": {"text": 16, "image": 16},
}
# of recipes/icons.yaml
_STUDY = {
    "qk_norm": "rmsnorm",
    "tie_word_embeddings": True,
    "modality_loss_weights": {"text": 5.0},
    "z_loss_coef": 1e-5,
}
_IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
# seeds of batches that thresholds are computed from, other ones than those that are timed
_SETTLING_SEEDS = range(1000, 1004)
_ATTENTION_SCALE = 0.02


def mixed_tokens(shape: Shape, rows: int, length: int, text_share: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Ids `[B, T]` of words and of images in turns, each row at another place in the turn."""
    generator = torch.Generator().manual_seed(seed)
    words_BT = torch.randint(5, shape.first_code, (rows, length), generator=generator)
    codes_BT = torch.randint(shape.first_code, shape.vocab_size, (rows, length), generator=generator)
    period = round(shape.image_length / (1 - text_share))
    phase_B1 = torch.arange(rows).unsqueeze(1) * period // max(rows, 1)
    place_BT = (torch.arange(length) + phase_B1) % period
    return torch.where(place_BT < period - shape.image_length, words_BT, codes_BT)


def in_quarters(rows: int, length: int) -> torch.Tensor:
    """Positions `[B, T]` of rows of four documents each."""
    return (torch.arange(length) % (length // 4)).expand(rows, -1)


def as_captions(rows: int, length: int) -> torch.Tensor:
    """
    Positions `[B, T]` of rows of small images with their captions, some short texts and a few long ones.

    The last document of a row is cut, and the next row begins with its rest, as far as it reaches.
    """
    generator = random.Random(0)
    positions: list[int] = []
    while len(positions) < rows * length:
        kind = generator.random()
        low, high = (66, 85) if kind < 0.88 else (5, 30) if kind < 0.97 else (120, 300)
        positions += range(generator.randint(low, high))
    return torch.tensor(positions[: rows * length]).view(rows, length)


PACKINGS = {"quarters": in_quarters, "captions": as_captions}


def _common(shape: Shape, length: int) -> dict:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads,
        "max_position_embeddings": max(4096, length),
    }


def _llama(shape: Shape, length: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_common(shape, length), **_IDS))


def _olmoe(implementation: str, shape: Shape, length: int) -> PreTrainedModel:
    sizes = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 1}
    model = OlmoeForCausalLM(OlmoeConfig(**_common(shape, length), **_IDS, **sizes))
    model.set_experts_implementation(implementation)
    return model


def moma_config(experts: str, shape: Shape, length: int, **fields) -> MomaConfig:
    """A MoMa whose attention and norms are those of Llama, so that the feed-forward layers are what differs."""
    own = {
        "num_experts": EXPERTS[experts],
        "modality_token_ranges": {"image": [[shape.first_code, shape.vocab_size]]},
        "begin_image_token_id": 3,
        "end_image_token_id": 4,
        "image_seq_length": shape.image_length,
        "norm_placement": "pre",
        "qk_norm": "none",
        "z_loss_coef": 0.0,
        "routing_warmup_steps": 0,
    }
    return MomaConfig(**{**_common(shape, length), **own, **fields})


def _settled(config: MomaConfig, shape: Shape, length: int) -> MomaForCausalLM:
    """
    A model with thresholds that let each expert and each depth layer take its share, as those of a trained model do.

    Untrained attention adds nearly the same to all tokens of a row, so that random routers take them all or none of
    them; made small, it leaves tokens to be told apart by what they are.
    """
    model = MomaForCausalLM(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MomaAttention):
                module.o_proj.weight.mul_(_ATTENTION_SCALE)
    batches = [{"input_ids": mixed_tokens(shape, 4, min(length, 512), seed=seed)} for seed in _SETTLING_SEEDS]
    if any(isinstance(module, MomaRouterBase) for module in model.modules()):
        calibrate_thresholds(model, batches, routing="threshold")
    return model


def _moma(
    experts: str,
    shape: Shape,
    length: int,
    change: Callable[[MomaForCausalLM], object] = lambda model: None,
    **fields,
) -> MomaForCausalLM:
    model = _settled(moma_config(experts, shape, length, **fields), shape, length)
    change(model)
    return model


def _depth_of_equal_flops(shape: Shape, length: int) -> MomaForCausalLM:
    """Depth on every other layer, as many layers as come closest to the FLOPs of 4t4i without depth."""
    tokens = {"text": 1, "image": 1}
    target = training_flops(moma_config("4t4i", shape, length), tokens, length)
    candidates = [
        moma_config("4t4i", shape, length, num_hidden_layers=number, depth_layers=list(range(0, number, 2)))
        for number in range(shape.num_layers, 2 * shape.num_layers + 1)
    ]
    closest = min(candidates, key=lambda each: abs(training_flops(each, tokens, length) - target))
    return _settled(closest, shape, length)


_study = partial(_moma, "4t4i", shared_expert_intermediate_size={"text": 256, "image": 256}, **_STUDY)
# what makes a model at a shape, for sequences of a length
CONTENDERS: dict[str, Callable[[Shape, int], PreTrainedModel]] = {
    "llama": _llama,
    **{name: partial(_moma, name) for name in EXPERTS},
    **{
        f"4t4i {rule}": partial(_moma, "4t4i", training_routing=rule, inference_routing=rule)
        for rule in ("threshold", "token_choice")
    },
    "4t4i grouped_mm": partial(_moma, "4t4i", change=lambda model: model.set_experts_implementation("grouped_mm")),
    "4t4i flash_attention_2": partial(
        _moma, "4t4i", change=lambda model: model.set_attn_implementation("flash_attention_2")
    ),
    "mod-4t4i": _depth_of_equal_flops,
    # as wide as an expert and the shared one
    "study dense": partial(_moma, "dense", intermediate_size=384, **_STUDY),
    "study 4t4i": _study,
    # the layers as they are written, and the library's attention
    "study 4t4i plain": partial(_study, change=lambda model: use_cpu_layers(model, False)),
    **{name: partial(_olmoe, name.split()[1]) for name in OLMOE},
}


def build(name: str, shape: Shape, length: int, device: str) -> PreTrainedModel:
    """A contender with weights drawn from the same seed each time."""
    torch.manual_seed(0)
    return CONTENDERS[name](shape, length).to(device)
