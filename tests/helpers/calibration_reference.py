# SPDX-License-Identifier: Apache-2.0
"""Models and plain loops that tests of calibration and of auxiliary routers share."""

import math
from collections import defaultdict
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from helpers.depth_reference import best_of, pools_of, taken_of
from helpers.reference import GROUPS, reference_cut
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.calibration.observation import named_routers
from modeling_moma.routing_moma import MomaRouter


DEPTH = {"num_hidden_layers": 2, "depth_layers": [0]}
MODELS = {
    "4t4i": GROUPS["4t4i"],
    "8x": GROUPS["8x"],
    "2t3i": {"num_experts": {"text": 2, "image": 3}, "expert_capacity_factor": {"text": 0.75, "image": 1.5}},
    "depth": {**GROUPS["4t4i"], **DEPTH, "depth_capacity": 0.4},
    "depth_by_modality": {**GROUPS["1t1i"], **DEPTH, "depth_capacity": {"text": 0.5, "image": 0.25}},
    "depth_by_modality_4t4i": {**GROUPS["4t4i"], **DEPTH, "depth_capacity": {"text": 0.5, "image": 0.25}},
}
ALL_MODELS = pytest.mark.parametrize("name", list(MODELS))


def build(name, **fields):
    """A model in eval mode, with auxiliary routers whose probabilities stay clear of 1, where they would tie."""
    model = tiny_model(**MODELS[name], auxiliary_routers=True, **fields).eval()
    for router in named_routers(model).values():
        router.auxiliary.down_proj.weight.data *= 0.1
    return model


def padded_batches():
    """Three batches of mixed rows of unlike lengths, padded on the right, on the left, and not at all."""
    batches = []
    for seed, side in enumerate((1, -1, 0)):
        ids = mixed_ids(rows=3, length=14, seed=seed)
        mask = torch.ones_like(ids)
        if side:
            mask[0, -4:] = mask[1, -1:] = 0
            mask = mask if side > 0 else mask.flip(1)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def text_only(seed=5):
    return {"input_ids": torch.randint(26, 40, (2, 9), generator=torch.Generator().manual_seed(seed))}


def router_calls(model, batch):
    """What each router is called with under expert choice, by name."""
    calls = {}

    def hook(name):
        return lambda router, args, output: calls.update({name: (args[0].detach(), args[1])})

    handles = [router.register_forward_hook(hook(name)) for name, router in named_routers(model).items()]
    # without gradients, groups without tokens would rest
    model.eval()(**batch, routing="expert_choice")
    for handle in handles:
        handle.remove()
    return calls


def pools_of_call(config, router, hidden, context, scores):
    """(cut, score, flat positions, those of members, K) of all that compete with one another."""
    if isinstance(router, MomaRouter):
        number = hidden.shape[0]
        take = min(number, math.ceil(Fraction(str(router.capacity_factor)) * number / router.num_experts))
        for expert in range(router.num_experts if number else 0):
            ranked = sorted(range(number), key=lambda position, expert=expert: -scores[position][expert])
            yield expert, expert, range(number), ranked[:take], take
        return
    length = hidden.shape[1]
    values = [[scores[row * length + place][0] for place in range(length)] for row in range(hidden.shape[0])]
    for pool, members in pools_of(config, context.modality_BT, context.rows.padding_BT).items():
        take = taken_of(config, pool, len(members))
        flat, best = ([row * length + place for row, place in at] for at in (members, best_of(values, members, take)))
        yield pool, 0, flat, best, take


def plain_records(model, batch):
    """For each router, by plain loops: (cut, true score, probability, is member, input, score's number) of each pair,
    and the value of each cut, the mean over its pools."""
    records = {}
    for name, (hidden, context) in router_calls(model, batch).items():
        router = model.get_submodule(name)
        x_ND = hidden.reshape(-1, hidden.shape[-1]).float()
        scores = torch.sigmoid(F.linear(x_ND, router.weight)).tolist()
        inner = F.silu(F.linear(x_ND, router.auxiliary.up_proj.weight))
        predicted = torch.sigmoid(F.linear(inner, router.auxiliary.down_proj.weight)).tolist()
        pairs, found = [], defaultdict(list)
        for cut, column, positions, best, take in pools_of_call(model.config, router, hidden, context, scores):
            found[cut].append(reference_cut([scores[position][column] for position in positions], take))
            for position in positions:
                is_member = position in best
                values = (scores[position][column], predicted[position][column], is_member, x_ND[position], column)
                pairs.append((cut, *values))
        records[name] = pairs, {cut: sum(values) / len(values) for cut, values in found.items()}
    return records


def predicted_cut(pairs, cut):
    mine = [pair for pair in pairs if pair[0] == cut]
    members = sum(pair[3] for pair in mine)
    return reference_cut([pair[2] for pair in mine], members) if members else None


def expected_cuts(model, batches, kind):
    """Means over the batches that voted and their numbers, `{router: {cut: (mean, votes)}}`."""
    values = defaultdict(lambda: defaultdict(list))
    for batch in batches:
        for name, (pairs, found) in plain_records(model, batch).items():
            for cut in {pair[0] for pair in pairs}:
                values[name][cut].append(found[cut] if kind == "threshold" else predicted_cut(pairs, cut))
    return {name: {cut: (sum(v) / len(v), len(v)) for cut, v in cuts.items()} for name, cuts in values.items()}


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
