# SPDX-License-Identifier: Apache-2.0
"""The models that are compared, ours at any shape and those of `peers`, by name."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from benchmarks.speed.peers import PEERS
from benchmarks.speed.shapes import Shape, mixed_tokens
from modeling_moma import MomaConfig, MomaForCausalLM
from modeling_moma.calibration.thresholds import calibrate_thresholds
from modeling_moma.cpu_moma import use_cpu_layers
from modeling_moma.modeling_moma import MomaAttention
from modeling_moma.planning.costs import training_flops
from modeling_moma.routing_moma import MomaRouterBase


# batches that thresholds are computed from
SETTLING_BATCHES = 4
# other tokens than those that are timed
_SETTLING_SEED = 1000
_ATTENTION_SCALE = 0.02
EXPERTS = {
    "dense": 1,
    "1t1i": {"text": 1, "image": 1},
    "4t4i": {"text": 4, "image": 4},
    "16t16i": {"text": 16, "image": 16},
}
# makes a model at a shape, for sequences of a length
Builder = Callable[[Shape, int], PreTrainedModel]
CONTENDERS: dict[str, Builder] = dict(PEERS)


def contender(name: str):
    """Enter a function that builds a model."""

    def keep(build: Builder) -> Builder:
        CONTENDERS[name] = build
        return build

    return keep


def moma_config(shape: Shape, experts: str, length: int, **fields) -> MomaConfig:
    """A MoMa whose attention and norms are those of Llama, so that the feed-forward layers are what differs."""
    return MomaConfig(
        **{
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "max_position_embeddings": max(4096, length),
            "num_experts": EXPERTS[experts],
            "modality_token_ranges": {"image": [[shape.first_code, shape.vocab_size]]},
            "begin_image_token_id": 3,
            "end_image_token_id": 4,
            "image_seq_length": shape.image_length,
            "norm_placement": "pre",
            "qk_norm": "none",
            "z_loss_coef": 0.0,
            "routing_warmup_steps": 0,
            **fields,
        }
    )


def _moma(experts: str, **fields):
    def build(shape: Shape, length: int) -> MomaForCausalLM:
        return settled(MomaForCausalLM(moma_config(shape, experts, length, **fields)), shape, length)

    return build


def settled(model: MomaForCausalLM, shape: Shape, length: int) -> MomaForCausalLM:
    """
    The model with thresholds that let each expert and each depth layer take its share, as those of a trained model do.

    Untrained attention adds nearly the same to all tokens of a row, so that random routers take them all or none of
    them; made small, it leaves tokens to be told apart by what they are.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MomaAttention):
                module.o_proj.weight.mul_(_ATTENTION_SCALE)
    seeds = range(_SETTLING_SEED, _SETTLING_SEED + SETTLING_BATCHES)
    batches = [{"input_ids": mixed_tokens(shape, 4, min(length, 512), seed=seed)} for seed in seeds]
    if any(isinstance(module, MomaRouterBase) for module in model.modules()):
        calibrate_thresholds(model, batches, routing="threshold")
    return model


for _name in EXPERTS:
    contender(_name)(_moma(_name))
for _rule in ("threshold", "token_choice"):
    contender(f"4t4i {_rule}")(_moma("4t4i", training_routing=_rule, inference_routing=_rule))


_STUDY = {
    "qk_norm": "rmsnorm",
    "tie_word_embeddings": True,
    "modality_loss_weights": {"text": 5.0},
    "z_loss_coef": 1e-5,
}
# as wide as an expert and the shared one
contender("study dense")(_moma("dense", intermediate_size=384, **_STUDY))
# of recipes/icons.yaml
contender("study 4t4i")(_moma("4t4i", shared_expert_intermediate_size={"text": 256, "image": 256}, **_STUDY))


@contender("study 4t4i plain")
def without_cpu_layers(shape: Shape, length: int) -> PreTrainedModel:
    """The same model with the layers as they are written, and the library's attention."""
    model = CONTENDERS["study 4t4i"](shape, length)
    use_cpu_layers(model, False)
    return model


def _with(setting: str, value: str):
    def build(shape: Shape, length: int) -> PreTrainedModel:
        model = CONTENDERS["4t4i"](shape, length)
        getattr(model, f"set_{setting}_implementation")(value)
        return model

    return build


contender("4t4i grouped_mm")(_with("experts", "grouped_mm"))
contender("4t4i flash_attention_2")(_with("attn", "flash_attention_2"))


@contender("mod-4t4i")
def depth_of_equal_flops(shape: Shape, length: int) -> MomaForCausalLM:
    """Depth on every other layer, as many layers as come closest to the FLOPs of 4t4i without depth."""
    tokens = {"text": 1, "image": 1}
    target = training_flops(moma_config(shape, "4t4i", length), tokens, length)

    def config(num_layers: int) -> MomaConfig:
        layers = list(range(0, num_layers, 2))
        return moma_config(shape, "4t4i", length, num_hidden_layers=num_layers, depth_layers=layers)

    candidates = [config(number) for number in range(shape.num_layers, 2 * shape.num_layers + 1)]
    closest = min(candidates, key=lambda each: abs(training_flops(each, tokens, length) - target))
    return settled(MomaForCausalLM(closest), shape, length)


def build(name: str, shape: Shape, length: int, device: str) -> PreTrainedModel:
    """
    A contender with weights drawn from the same seed each time.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in CONTENDERS:
        raise ValueError(f"there is no contender {name!r}; there are {sorted(CONTENDERS)}.")
    torch.manual_seed(0)
    return CONTENDERS[name](shape, length).to(device)
