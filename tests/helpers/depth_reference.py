# SPDX-License-Identifier: Apache-2.0
"""Plain-loop references of mixture of depths: who is chosen, and what a whole model with depth layers computes."""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F

from helpers.reference import assert_near, reference_cut, reference_feed_forward, reference_membership, trainable
from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.token_groups_moma import token_modalities


def pools_of(config: MomaConfig, modality_BT, padding_BT=None) -> dict[int, list[tuple[int, int]]]:
    """Positions (row, place) that compete with one another, by pool of modality."""
    pools = {}
    num_rows, length = modality_BT.shape
    for row in range(num_rows):
        for place in range(length):
            if padding_BT is not None and padding_BT[row, place]:
                continue
            pool = modality_BT[row, place].item() if isinstance(config.depth_capacity, dict) else 0
            pools.setdefault(pool, []).append((row, place))
    return pools


def capacity_of(config: MomaConfig, pool: int) -> float:
    """Share of the tokens of a modality's pool."""
    if isinstance(config.depth_capacity, dict):
        return config.depth_capacity[config.modalities[pool]]
    return config.depth_capacity


def taken_of(config: MomaConfig, pool: int, number: int) -> int:
    """`K` of a pool of so many tokens, by the decimal number that the capacity is written as."""
    return math.ceil(Fraction(str(capacity_of(config, pool))) * number)


def best_of(values, members, number: int) -> list[tuple[int, int]]:
    """The best members (row, place): of equal ones those at earlier places, and at the last place all rows' own."""
    ranked = sorted(members, key=lambda at: (-values[at[0]][at[1]], at[1]))
    row, last = ranked[number - 1]
    ties = [at for at in ranked[number:] if at[1] == last and values[at[0]][last] == values[row][last]]
    return ranked[:number] + ties


def reference_choice(config, router, hidden_BTD, scores_BT, modality_BT, routing, padding_BT=None) -> torch.Tensor:
    """Chosen positions `[B, T]` that the rules give, by plain sorting."""
    values = scores_BT.tolist()
    chosen_BT = torch.zeros(scores_BT.shape, dtype=torch.bool)
    cuts, biases = router.threshold.tolist(), router.balance_bias.tolist()
    for pool, members in pools_of(config, modality_BT, padding_BT).items():
        if routing == "expert_choice":
            taken = best_of(values, members, taken_of(config, pool, len(members)))
        elif routing == "threshold":
            taken = [at for at in members if values[at[0]][at[1]] >= cuts[pool]]
        elif routing == "auxiliary":
            cut = router.auxiliary.threshold[pool].item()
            taken = [at for at in members if reference_membership(router.auxiliary, hidden_BTD[at])[0] >= cut]
        else:
            taken = [at for at in members if values[at[0]][at[1]] + biases[pool] >= 0.5]
        for row, place in taken:
            chosen_BT[row, place] = True
    return chosen_BT


def reference_cuts(config, scores_BT, modality_BT, padding_BT=None) -> list[float | None]:
    """The cut of each pool; `None` where it has no token."""
    cuts = [None for _ in config.depth_pools]
    for pool, members in pools_of(config, modality_BT, padding_BT).items():
        scores = [scores_BT[row, place].item() for row, place in members]
        cuts[pool] = reference_cut(scores, taken_of(config, pool, len(members)))
    return cuts


def rotated(x_ND, positions, theta):
    """Rotary embedding of `[N, d]`: channel k turns with channel k + d/2."""
    half = x_ND.shape[-1] // 2
    rows = []
    for x, position in zip(x_ND, positions):
        angles = torch.tensor([position * theta ** (-channel / half) for channel in range(half)])
        first, second = x[:half], x[half:]
        rows.append(
            torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])
        )
    return torch.stack(rows)


def reference_heads(config, projections, x_D):
    """Query, key and value of one token."""
    query, key, value = (
        layer(x_D).view(-1, config.head_dim) for layer in (projections.q_proj, projections.k_proj, projections.v_proj)
    )
    return projections.q_norm(query), projections.k_norm(key), value


def reference_attention(attention, x_ND, positions, modalities):
    """Causal attention among tokens of one row, `[N, D]`, that stand at these positions."""
    config = attention.config
    theta = config.rope_parameters["rope_theta"]
    own = [attention.modalities[name] if config.untied_attention else attention for name in modalities]
    query, key, value = map(
        torch.stack, zip(*(reference_heads(config, projections, x_D) for projections, x_D in zip(own, x_ND)))
    )
    heads = []
    for head in range(config.num_attention_heads):
        shared = head // attention.num_key_value_groups
        q, k = rotated(query[:, head], positions, theta), rotated(key[:, shared], positions, theta)
        outputs = []
        for place in range(len(positions)):
            weights = torch.softmax(k[: place + 1] @ q[place] / math.sqrt(config.head_dim), dim=0)
            outputs.append(weights @ value[: place + 1, shared])
        heads.append(torch.stack(outputs))
    return torch.stack([each.o_proj(x_D) for each, x_D in zip(own, torch.cat(heads, dim=-1))])


def reference_norm(norm, x_ND, modalities):
    """Each token by the norm of all, or of its modality."""
    return torch.stack([(norm[name] if hasattr(norm, name) else norm)(x_D) for name, x_D in zip(modalities, x_ND)])


def reference_layer(layer, hidden_BTD, runs_BT, weight_BT, modality_BT, routing):
    """What a layer makes of the tokens that run, attending to one another alone; the others stay."""
    is_pre = layer.norm_placement == "pre"
    names = [[layer.self_attn.config.modalities[kind] for kind in row] for row in modality_BT.tolist()]
    change_BTD = torch.zeros_like(hidden_BTD)
    for row in range(hidden_BTD.shape[0]):
        places = runs_BT[row].nonzero().flatten().tolist()
        if not places:
            continue
        x_ND, own = hidden_BTD[row, places], [names[row][place] for place in places]
        if is_pre:
            x_ND = reference_norm(layer.attention_norm, x_ND, own)
        change_ND = reference_attention(layer.self_attn, x_ND, places, own)
        if not is_pre:
            change_ND = reference_norm(layer.attention_norm, change_ND, own)
        change_BTD = change_BTD.index_put((torch.tensor([row] * len(places)), torch.tensor(places)), change_ND)
    middle_BTD = hidden_BTD + change_BTD
    flat_names = sum(names, [])

    def ffn_norm(x_BTD):
        return reference_norm(layer.ffn_norm, x_BTD.flatten(0, 1), flat_names).view_as(x_BTD)

    if is_pre:
        ffn_BTD = reference_feed_forward(layer.mlp, ffn_norm(middle_BTD), modality_BT, routing, ~runs_BT)
    else:
        ffn_BTD = ffn_norm(reference_feed_forward(layer.mlp, middle_BTD, modality_BT, routing, ~runs_BT))
    change_BTD = (change_BTD + ffn_BTD) * weight_BT.unsqueeze(-1)
    return torch.where(runs_BT.unsqueeze(-1), hidden_BTD + change_BTD, hidden_BTD)


def reference_logits(model, embeds_BTD, modality_BT, routing, depth_routing, padding_BT=None):
    """Logits `[B, T, V]` of a model with depth layers; at padding they mean nothing."""
    config = model.config
    hidden_BTD = embeds_BTD
    real_BT = torch.ones_like(modality_BT, dtype=torch.bool) if padding_BT is None else ~padding_BT
    for index, layer in enumerate(model.model.layers):
        runs_BT, weight_BT = real_BT, torch.ones(modality_BT.shape)
        if index in (config.depth_layers or ()):
            router = layer.depth_router
            weight_BT = torch.sigmoid(F.linear(hidden_BTD, router.weight)).squeeze(-1)
            runs_BT = reference_choice(config, router, hidden_BTD, weight_BT, modality_BT, depth_routing, padding_BT)
        hidden_BTD = reference_layer(layer, hidden_BTD, runs_BT, weight_BT, modality_BT, routing)
    return model.lm_head(model.model.norm(hidden_BTD))


def assert_equals_plain_loop(model, ids, mask, routing, attentions=("sdpa",), floor=1e-2):
    """A model's logits, and its gradients by the input and all parameters, are those of `reference_logits`."""
    generator = torch.Generator().manual_seed(0)
    kinds = token_modalities(model.config, ids)
    # random rather than looked up: equal tokens tie
    embeds = torch.randn(*ids.shape, model.config.hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(*ids.shape, model.config.vocab_size, generator=generator) * mask.unsqueeze(-1)
    names, parameters = zip(*trainable(model))

    def gradients(logits):
        grads = torch.autograd.grad((logits * weight).sum(), [embeds, *parameters], allow_unused=True)
        return dict(zip(["input", *names], grads))

    # before the model's own forward moves thresholds and biases
    expected = reference_logits(model, embeds, kinds, routing, routing, mask == 0)
    wanted = gradients(expected)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for attention in attentions:
        model.load_state_dict(state)
        model.set_attn_implementation(attention)
        logits = model(
            inputs_embeds=embeds, mm_token_type_ids=kinds, attention_mask=mask, routing=routing, use_cache=False
        ).logits
        assert_near(logits[mask == 1], expected[mask == 1], 1e-5)
        for key, gradient in gradients(logits).items():
            if wanted[key] is None:
                # the embedding, which nobody looked up; or weights without a token
                assert gradient is None or not gradient.any(), key
            else:
                # terms of about 1 cancel out, and how they are rounded depends on the processor
                assert_near(gradient, wanted[key], 2e-4, floor=floor)


class SelectionLog:
    """What the depth routers of a model chose, by layer and call, and the contexts that they were called with."""

    def __init__(self, model):
        layers = model.config.depth_layers or []
        self.chosen = {index: [] for index in layers}
        self.scores = {index: [] for index in layers}
        self.contexts = []
        for index in layers:
            model.model.layers[index].depth_router.register_forward_hook(self._hook(index))

    def _hook(self, index):
        def keep(module, args, output):
            logits_BT, selection = output
            self.chosen[index].append(selection.chosen_BT)
            self.scores[index].append(torch.sigmoid(logits_BT.detach()))
            self.contexts.append(args[1])

        return keep
