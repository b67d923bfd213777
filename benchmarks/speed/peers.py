# SPDX-License-Identifier: Apache-2.0
"""Models of Transformers that ours are compared with, by name and at any shape.

All have the sizes of ours, so that a token meets as many parameters: dense ones one network in each layer, sparse ones
several networks of that size, of which each token meets one.
"""

from collections.abc import Callable

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

from benchmarks.speed.shapes import Shape


# experts of a sparse peer, and of each modality where those are apart
NUM_EXPERTS, NUM_EXPERTS_PER_MODALITY = 8, 4
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def _common(shape: Shape, length: int) -> dict:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads,
        "max_position_embeddings": max(4096, length),
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def llama(shape: Shape, length: int) -> PreTrainedModel:
    """The dense decoder that most others are forms of."""
    return LlamaForCausalLM(LlamaConfig(**_common(shape, length)))


def chameleon(shape: Shape, length: int) -> PreTrainedModel:
    """The dense decoder of words and images that MoMa began from; its image tokenizer is as small as may be."""
    tokenizer = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32}
    tokenizer |= {"channel_multiplier": [1], "num_res_blocks": 1, "resolution": 16}
    return ChameleonForConditionalGeneration(
        ChameleonConfig(**_common(shape, length), vq_config=tokenizer, vocabulary_map={"<image>": 3})
    )


def sparse(config_class: type, model_class: type, implementation: str, **fields) -> Callable:
    """What builds a model of several experts in each layer, of which each token chooses one."""

    def build(shape: Shape, length: int) -> PreTrainedModel:
        model = model_class(config_class(**_common(shape, length), num_experts_per_tok=1, **fields))
        model.set_experts_implementation(implementation)
        return model

    return build


class TypedErnie(Ernie4_5_VLMoeForConditionalGeneration):
    """Tells the model which ids are image codes, as its processor would."""

    first_code = 0

    def forward(self, input_ids: torch.Tensor, **kwargs):
        """See the class it comes from."""
        return super().forward(input_ids, moe_mm_token_type_ids=(input_ids >= self.first_code).int(), **kwargs)


def ernie(implementation: str) -> Callable:
    """What builds a model with experts of words and experts of images, of which each token chooses one."""

    def build(shape: Shape, length: int) -> PreTrainedModel:
        # three parts of the rotary angles, in the shares of the released model
        half = shape.hidden_size // shape.num_heads // 2
        side = half * 11 // 32
        text = {
            **_common(shape, length),
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

    return build


PEERS: dict[str, Callable[[Shape, int], PreTrainedModel]] = {"llama": llama, "chameleon": chameleon}
for _name in IMPLEMENTATIONS:
    PEERS[f"olmoe {_name}"] = sparse(OlmoeConfig, OlmoeForCausalLM, _name, num_experts=NUM_EXPERTS)
    PEERS[f"mixtral {_name}"] = sparse(
        MixtralConfig, MixtralForCausalLM, _name, num_local_experts=NUM_EXPERTS, sliding_window=None
    )
    PEERS[f"ernie {_name}"] = ernie(_name)
