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
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
)

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
# experts of a sparse peer, and of each modality where those are apart
NUM_EXPERTS, NUM_EXPERTS_PER_MODALITY = 8, 4
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
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
        "max_position_embeddings": max(4096, length),
    }


def _peer(config_class: type, model_class: type, implementation: str | None, shape: Shape, length: int, **fields):
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "num_key_value_heads": shape.num_heads}
    model = model_class(config_class(**_common(shape, length), **ids, **fields))
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model


class TypedErnie(Ernie4_5_VLMoeForConditionalGeneration):
    """Tells the model which ids are image codes, as its processor would."""

    first_code = 0

    def forward(self, input_ids: torch.Tensor, **kwargs):
        """See the class it comes from."""
        return super().forward(input_ids, moe_mm_token_type_ids=(input_ids >= self.first_code).int(), **kwargs)


def _ernie(implementation: str, shape: Shape, length: int) -> PreTrainedModel:
    """A model with experts of words and experts of images, of which each token chooses one."""
    # three parts of the rotary angles, in the shares of the released model
    half = shape.hidden_size // shape.num_heads // 2
    side = half * 11 // 32
    text = {
        **_common(shape, length),
        **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "num_key_value_heads": shape.num_heads},
        "moe_num_experts": NUM_EXPERTS_PER_MODALITY,
        "moe_k": 1,
        "moe_intermediate_size": [shape.intermediate_size] * 2,
        "moe_num_shared_experts": 0,
        "mlp_layer_types": ["sparse"] * shape.num_layers,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [side, side, half - 2 * side],
        },
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    model = TypedErnie(Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision))
    model.first_code = shape.first_code
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
    experts: str, shape: Shape, length: int, change: Callable[[MomaForCausalLM], object] | None = None, **fields
) -> MomaForCausalLM:
    model = _settled(moma_config(experts, shape, length, **fields), shape, length)
    if change is not None:
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


def _chameleon(shape: Shape, length: int) -> PreTrainedModel:
    """The dense decoder of words and images that MoMa began from; its image tokenizer is as small as may be."""
    tokenizer = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32}
    tokenizer |= {"channel_multiplier": [1], "num_res_blocks": 1, "resolution": 16}
    more = {"vq_config": tokenizer, "vocabulary_map": {"<image>": 3}}
    return _peer(ChameleonConfig, ChameleonForConditionalGeneration, None, shape, length, **more)


_study = partial(_moma, "4t4i", shared_expert_intermediate_size={"text": 256, "image": 256}, **_STUDY)
# what makes a model at a shape, for sequences of a length
CONTENDERS: dict[str, Callable[[Shape, int], PreTrainedModel]] = {
    "llama": partial(_peer, LlamaConfig, LlamaForCausalLM, None),
    "chameleon": _chameleon,
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
}
for _name in IMPLEMENTATIONS:
    CONTENDERS[f"olmoe {_name}"] = partial(
        _peer, OlmoeConfig, OlmoeForCausalLM, _name, num_experts=NUM_EXPERTS, num_experts_per_tok=1
    )
    CONTENDERS[f"mixtral {_name}"] = partial(
        _peer,
        MixtralConfig,
        MixtralForCausalLM,
        _name,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=1,
        sliding_window=None,
    )
    CONTENDERS[f"ernie {_name}"] = partial(_ernie, _name)


def build(name: str, shape: Shape, length: int, device: str) -> PreTrainedModel:
    """A contender with weights drawn from the same seed each time."""
    torch.manual_seed(0)
    return CONTENDERS[name](shape, length).to(device)
