# SPDX-License-Identifier: Apache-2.0
"""Plain-loop references of the expert layers, and the small models that the tests share."""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F

from modeling_moma.documents_moma import Rows
from modeling_moma.token_groups_moma import RoutingContext, split_modalities


GROUPS = {
    "dense": {"num_experts": 1},
    "1t1i": {"num_experts": {"text": 1, "image": 1}},
    "8x": {"num_experts": 8},
    "4t4i": {"num_experts": {"text": 4, "image": 4}},
    "6t2i": {
        "num_experts": {"text": 6, "image": 2},
        "expert_intermediate_size": {"text": 16, "image": 48},
        "expert_capacity_factor": {"text": 1.5, "image": 0.75},
    },
    "shared": {"num_experts": {"text": 4, "image": 2}, "shared_expert_intermediate_size": 24},
    "shared_by_modality": {
        "num_experts": {"text": 4, "image": 2},
        "shared_expert_intermediate_size": {"image": 24},
    },
}


def fields_of(*routings: str) -> dict:
    """Fields of the config without which a model cannot follow these routings."""
    return {"auxiliary_routers": True} if "auxiliary" in routings else {}


def trainable(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Named parameters that a training of the model moves: all but those of auxiliary routers."""
    return [pair for pair in module.named_parameters() if ".auxiliary." not in pair[0]]


def context_of(config, modality_BT, routing, padding_BT=None, track=False) -> RoutingContext:
    """The routing context of one feed-forward call."""
    split, _ = split_modalities(config, modality_BT, padding_BT)
    return RoutingContext(routing, split, track=track, modality_BT=modality_BT, rows=Rows(padding_BT))


def swiglu(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def reference_membership(network, x) -> list[float]:
    """Probabilities by the auxiliary router that one token is a member, one for each score."""
    inner = F.silu(network.up_proj.weight @ x.float())
    return torch.sigmoid(network.down_proj.weight @ inner).tolist()


def reference_cut(scores: list[float], take: int) -> float:
    """Midway between the K-th best score and the next lower one, by plain sorting; just below the lowest of all."""
    ranked = sorted(scores, reverse=True)
    kth = ranked[take - 1]
    # what rounding alone keeps apart is one score
    lower = [score for score in ranked if score < kth * (1 - 2**-18)]
    return (kth + lower[0]) / 2 if lower else kth * (1 - 2**-10)


def reference_selection(router, scores, routing, x_ND=None, modality_N=None) -> list[tuple[int, int]]:
    """(token, expert) pairs that the rules give, by plain sorting; `auxiliary` looks at the tokens themselves."""
    num_tokens, num_experts = scores.shape
    values = scores.tolist()
    pairs = []
    if routing == "expert_choice":
        take = min(num_tokens, math.ceil(Fraction(str(router.capacity_factor)) * num_tokens / num_experts))
        for expert in range(num_experts):
            ranked = sorted(range(num_tokens), key=lambda token: -values[token][expert])
            pairs += [(token, expert) for token in ranked[:take]]
    elif routing == "threshold":
        cuts = router.threshold.tolist()
        pairs = [(t, e) for t in range(num_tokens) for e in range(num_experts) if values[t][e] >= cuts[e]]
    elif routing == "auxiliary":
        cuts = router.auxiliary.threshold.tolist()
        for token in range(num_tokens):
            members = reference_membership(router.auxiliary, x_ND[token])
            pairs += [(token, expert) for expert in range(num_experts) if members[expert] >= cuts[expert]]
    else:
        biases = router.balance_bias.tolist()
        for token in range(num_tokens):
            bias = biases[modality_N[token]] if router.balance_bias.ndim == 2 else biases
            ranked = sorted(range(num_experts), key=lambda expert: -(values[token][expert] + bias[expert]))
            pairs += [(token, expert) for expert in ranked[: router.num_experts_per_tok]]
    return pairs


def reference_group(group, x_ND, routing, modality_N=None):
    """One group's outputs `[N, D]` and sums of gates `[N]`, token by token and expert by expert."""
    outputs = [torch.zeros_like(x, dtype=torch.float32) for x in x_ND]
    gates = [torch.zeros((), dtype=torch.float32) for _ in x_ND]
    if group.num_experts == 1:
        mlp = group.mlp
        outputs = [swiglu(x, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight) for x in x_ND]
        gates = [gate + 1 for gate in gates]
    else:
        scores = torch.sigmoid(F.linear(x_ND.float(), group.router.weight))
        pairs = reference_selection(group.router, scores, routing, x_ND, modality_N)
        # a divisor without a gradient
        sums = [sum(scores[t, e].item() for t, e in pairs if t == token) for token in range(len(outputs))]
        for token, expert in pairs:
            weight = scores[token, expert] / sums[token] if group.router.normalizes_gates else scores[token, expert]
            gate, up = group.experts.gate_up_proj[expert].chunk(2)
            output = swiglu(x_ND[token], gate, up, group.experts.down_proj[expert])
            outputs[token] = outputs[token] + weight * output
            gates[token] = gates[token] + weight
    if group.shared_expert is not None:
        mlp = group.shared_expert
        for token, x in enumerate(x_ND):
            outputs[token] = outputs[token] + swiglu(x, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
            gates[token] = gates[token] + 1
    if not outputs:
        return x_ND.new_zeros(x_ND.shape), x_ND.new_zeros(0)
    return torch.stack([output.to(x_ND.dtype) for output in outputs]), torch.stack(gates)


def reference_feed_forward(layer, hidden_BTD, modality_BT, routing, padding_BT=None):
    """What `MomaFeedForward` gives, `[B, T, D]`, with zeros (or the shared expert alone) at padding."""
    return reference_gated_feed_forward(layer, hidden_BTD, modality_BT, routing, padding_BT)[0]


def reference_gated_feed_forward(layer, hidden_BTD, modality_BT, routing, padding_BT=None):
    """The outputs `[B, T, D]`, and each token's sum of gates `[B, T, 1]`, in which a shared expert counts 1."""
    flat = hidden_BTD.flatten(0, 1)
    rows = [torch.zeros_like(x) for x in flat]
    sums = [torch.zeros((), dtype=torch.float32) for _ in flat]
    is_padding = torch.zeros_like(modality_BT) if padding_BT is None else padding_BT
    for index, group in enumerate(layer.groups.values()):
        mine = [
            position
            for position, modality in enumerate(modality_BT.flatten().tolist())
            if not is_padding.flatten()[position] and (len(layer.groups) == 1 or modality == index)
        ]
        if mine:
            modality_N = modality_BT.flatten()[mine].tolist()
            for position, row, gate in zip(mine, *reference_group(group, flat[mine], routing, modality_N)):
                rows[position], sums[position] = row, gate
    if layer.shared_expert is not None:
        mlp = layer.shared_expert
        for position, x in enumerate(flat):
            rows[position] = rows[position] + swiglu(x, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        sums = [gate + 1 for gate in sums]
    gate_BT1 = torch.stack(sums).unsqueeze(-1).to(hidden_BTD.dtype)
    return torch.stack(rows).unflatten(0, hidden_BTD.shape[:2]), gate_BT1.unflatten(0, hidden_BTD.shape[:2])


def assert_near(actual, expected, relative, floor=1e-6):
    """Equal to a share of the largest entry, or of `floor`: entries near 0 carry rounding of others."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    scale = expected.abs().max().item() if expected.numel() else 0.0
    difference = (actual.float() - expected.float()).abs().max().item() if expected.numel() else 0.0
    assert difference <= relative * max(scale, floor), f"differs by {difference} at scale {scale}"
