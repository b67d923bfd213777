# SPDX-License-Identifier: Apache-2.0
"""Seeds that look trained, the targets that they grow to, and their groups side by side."""

import torch

from helpers.reference import GROUPS, context_of
from helpers.tiny import mixed_ids, tiny_model


ONE_EACH, FOUR_EACH = {"text": 1, "image": 1}, {"text": 4, "image": 4}
DEPTH = {"num_hidden_layers": 3, "depth_layers": [0, 2], "depth_capacity": 0.5}
# fields of the seed, and the target
CASES = {
    "4t4i": (GROUPS["1t1i"], FOUR_EACH),
    "6t2i": (GROUPS["1t1i"], {"text": 6, "image": 2}),
    "4t1i": (GROUPS["1t1i"], {"text": 4, "image": 1}),
    "16t4i": (GROUPS["1t1i"], {"text": 16, "image": 4}),
    "dense to 4t4i": (GROUPS["dense"], FOUR_EACH),
    "dense to 4t1i": (GROUPS["dense"], {"text": 4, "image": 1}),
    "dense to 8x": (GROUPS["dense"], 8),
    "shared": ({**GROUPS["shared"], "num_experts": ONE_EACH}, FOUR_EACH),
    "dense with shared to 8x": ({"num_experts": 1, "shared_expert_intermediate_size": 24}, 8),
    "shared_by_modality": ({**GROUPS["shared_by_modality"], "num_experts": ONE_EACH}, FOUR_EACH),
    "depth": ({**GROUPS["1t1i"], **DEPTH}, FOUR_EACH),
    "depth by modality": ({**GROUPS["1t1i"], **DEPTH, "depth_capacity": {"text": 0.5, "image": 0.25}}, FOUR_EACH),
    "dense with depth": ({**GROUPS["dense"], **DEPTH}, 8),
    "pre": ({**GROUPS["1t1i"], "norm_placement": "pre", "qk_norm": "rmsnorm"}, FOUR_EACH),
    "gate_after_norm": ({**GROUPS["1t1i"], "gate_after_norm": True, "qk_norm": "layernorm_per_head"}, FOUR_EACH),
    "untied": ({**GROUPS["1t1i"], **DEPTH, "untied_attention": True}, FOUR_EACH),
    "uneven": ({**GROUPS["1t1i"], "expert_intermediate_size": {"text": 16, "image": 48}}, FOUR_EACH),
    "tied": ({**GROUPS["1t1i"], "tie_word_embeddings": True, "attention_bias": True}, FOUR_EACH),
    "auxiliary": ({**GROUPS["1t1i"], **DEPTH, "auxiliary_routers": True}, FOUR_EACH),
}


def trained_seed(**fields):
    """A seed whose norms, biases, thresholds and their counts are not those of a fresh model."""
    seed = tiny_model(**fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in seed.state_dict().values():
            if tensor.ndim < 2:
                tensor += torch.rand(tensor.shape, generator=generator) * 0.2
    return seed


def group_of(layer, name):
    return layer.mlp.groups[name if name in layer.mlp.groups else "all"]


def matrices(mlp):
    return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight


def groups_of(seed, upcycled):
    """Layer by layer, the groups of the result, each with the seed's."""
    for seed_layer, layer in zip(seed.model.layers, upcycled.model.layers):
        for name, group in layer.mlp.groups.items():
            yield name, group_of(seed_layer, name), group


def tokens(rows=64, seed=3):
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def run_group(model, name, group, x_ND, routing):
    """A group's output and the number of experts that took each token."""
    context = context_of(model.config, torch.zeros(1, x_ND.shape[0], dtype=torch.long), routing)
    taken_N = torch.zeros(x_ND.shape[0], dtype=torch.long)
    _, selection = group.router(x_ND, context)
    chosen = selection.token_EK.flatten() if routing == "expert_choice" else selection.token_P
    for token in chosen.tolist():
        taken_N[token] += 1
    return group(x_ND, context)[0], taken_N


def padded_batch(filler=5):
    ids = mixed_ids(4, 16)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    mask[3, :7] = 0
    return {"input_ids": torch.where(mask == 1, ids, filler), "attention_mask": mask}
