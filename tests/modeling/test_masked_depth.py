# SPDX-License-Identifier: Apache-2.0
"""Depth layers that run all tokens and mask those that they have not chosen, as on a device: nothing else differs."""

import copy
from itertools import product

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers.depth_reference import assert_equals_plain_loop
from helpers.reference import GROUPS, assert_near, fields_of
from helpers.tiny import IMAGE_IDS, left_padding, mixed_ids, tiny_model
from modeling_moma import cpu_moma, experts_implementations_moma, token_groups_moma
from modeling_moma.configuration_moma import rule_names
from modeling_moma.depth_moma import DepthLayer, MomaDepthRouter
from modeling_moma.training.metrics_callback import MomaMetricsCallback


DEPTH = {"num_hidden_layers": 3, "depth_layers": [0, 2], "depth_capacity": 0.5}
FOUR = GROUPS["4t4i"]
VARIANTS = {
    "dense": GROUPS["dense"],
    "1t1i": {**GROUPS["1t1i"], "norm_placement": "post"},
    "8x": GROUPS["8x"],
    "4t4i": {**FOUR, "norm_placement": "post"},
    "4t4i_pre": {**FOUR, "norm_placement": "pre", "normalize_gates": True},
    "by_modality": {**FOUR, "depth_pool": "row", "depth_capacity": {"text": 0.3, "image": 0.6}},
    "wide": {**FOUR, "expert_capacity_factor": {"text": 4.0, "image": 1.7}, "num_key_value_heads": 1},
    "shared": GROUPS["shared"],
}
DOCUMENTS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], list(range(9)) + [0, 1, 2], list(range(12))])


def depth_model(name="4t4i", **fields):
    # a large eps keeps RMSNorm from cancelling gates, and their gradients from vanishing
    model = tiny_model(**{**DEPTH, "rms_norm_eps": 0.3, **VARIANTS[name], **fields})
    for module in model.modules():
        if isinstance(module, MomaDepthRouter):
            module.threshold.copy_(torch.linspace(0.47, 0.53, module.threshold.numel()))
            module.balance_bias.copy_(torch.linspace(-0.02, 0.02, module.threshold.numel()))
    return model


@pytest.fixture(params=["fixed", "sorted"])
def device(request, monkeypatch):
    monkeypatch.setattr(cpu_moma, "_CPU", ())
    monkeypatch.setattr(experts_implementations_moma, "_has_kernel", lambda dtype, sizes: request.param == "sorted")
    return monkeypatch


@pytest.fixture
def runs(monkeypatch):
    """How often a layer has run all tokens."""
    found, run = [], DepthLayer._run_masked

    def counted(self, *args, **kwargs):
        found.append(self.layer_idx)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(DepthLayer, "_run_masked", counted)
    return found


# each variant by one rule, and one of them by all
RULES = rule_names(may_train=True)
BY_RULE = {*((name, RULES[index % len(RULES)]) for index, name in enumerate(VARIANTS)), *product(["4t4i"], RULES)}


@pytest.mark.parametrize("name, routing", sorted(BY_RULE))
def test_a_masked_layer_equals_the_plain_loop(device, runs, name, routing):
    model, ids = depth_model(name, **fields_of(routing), routing_warmup_steps=0).train(), mixed_ids(3, 12)
    assert_equals_plain_loop(model, ids, left_padding(ids, 4, 0, 1), routing)
    assert runs == [0, 2]


INPUTS = {
    "plain": {},
    "padding": {"attention_mask": left_padding(mixed_ids(3, 12), 4, 0, 1)},
    "documents": {"position_ids": DOCUMENTS},
    "one modality": {"mm_token_type_ids": torch.zeros(3, 12, dtype=torch.long)},
}


# all pairs of rules, with and without checkpointing, and every input with each rule
TRAINED = [
    (*rules, list(INPUTS)[(index + 2 * checkpointing) % len(INPUTS)], checkpointing)
    for index, rules in enumerate(product(RULES, ["expert_choice", "threshold", "token_choice"]))
    for checkpointing in (False, True)
]


@pytest.mark.parametrize("routing, depth_routing, inputs, checkpointing", TRAINED)
def test_training_steps_are_those_of_packed_layers(device, runs, routing, depth_routing, inputs, checkpointing):
    fields = {"training_routing": routing, "depth_training_routing": depth_routing, "routing_warmup_steps": 1}
    # routers of experts that choose may also take the tokens that no expert took
    fields["cover_all_tokens"] = depth_routing == "threshold"
    found, averages = [], []
    for limit in (0, 2**30):
        device.setattr(token_groups_moma, "_FEW_OPERATIONS", limit)
        model = depth_model("by_modality" if checkpointing else "4t4i", gate_after_norm=True, **fields).train()
        callback = MomaMetricsCallback()
        if checkpointing:
            model.activation_checkpointing_enable()
        else:
            callback.attach(model)
        for seed in range(2):
            model.zero_grad()
            ids = mixed_ids(3, 12, seed=seed)
            given = {"input_ids": ids, **INPUTS[inputs]}
            if inputs == "padding":
                given["mm_token_type_ids"] = ((ids >= IMAGE_IDS[0]) & (ids < IMAGE_IDS[1])).long()
            if "mm_token_type_ids" in given:
                # random rather than looked up: equal tokens tie, and kernels of some CPUs part them by a rounding
                generator = torch.Generator().manual_seed(seed)
                given["inputs_embeds"] = torch.randn(3, 12, model.config.hidden_size, generator=generator)
                del given["input_ids"]
            output = model(**given, labels=ids, use_cache=False)
            output.loss.backward()
        averages.append(callback._averages(training=True))
        is_token = given.get("attention_mask", torch.ones_like(ids)) == 1
        found.append(
            {
                "logits": output.logits[is_token],
                **{name: weight.grad for name, weight in model.named_parameters()},
                **dict(model.named_buffers()),
            }
        )
        assert bool(runs) is bool(limit)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert averages[1] == pytest.approx(averages[0], rel=1e-4) and (checkpointing or len(averages[0]) > 5)


@pytest.mark.parametrize("length", [1, 2, 12])
@pytest.mark.parametrize("routing", ["expert_choice", "threshold", "token_choice"])
def test_a_training_step_that_makes_a_cache_equals_one_that_makes_none(device, runs, routing, length):
    found, caches = [], []
    for limit, use_cache in ((2**30, False), (2**30, True), (0, True)):
        device.setattr(token_groups_moma, "_FEW_OPERATIONS", limit)
        model, ids = depth_model(training_routing=routing, routing_warmup_steps=0).train(), mixed_ids(3, length)
        output = model(ids, labels=ids, use_cache=use_cache)
        output.logits.square().mean().backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found.append({"logits": output.logits, **gradients, **dict(model.named_buffers())})
        if use_cache:
            caches.append(output.cache)
    assert runs == [0, 2] * (2 if length == 1 else 1)
    for others in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for index in (0, 2):
        masked, packed = (cache.layers[index] for cache in caches)
        assert masked.get_seq_length() == packed.get_seq_length() == length
        assert masked.length_B.tolist() == packed.length_B.tolist()
        for row, number in enumerate(packed.length_B.tolist()):
            assert torch.equal(masked.slots[row, :number], packed.slots[row, :number])
            torch.testing.assert_close(masked.keys[row, :, :number], packed.keys[row, :, :number])
            torch.testing.assert_close(masked.values[row, :, :number], packed.values[row, :, :number])


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_noise_changes_whom_experts_take_and_not_their_thresholds(device, runs, routing):
    fields = {"training_routing": routing, "routing_warmup_steps": 0, "gumbel_noise": 5.0}
    models = [depth_model(**fields, depth_training_routing="expert_choice").train() for _ in range(2)]
    models[1].config.gumbel_noise = 0.0
    ids = mixed_ids(3, 12)
    for model in models:
        # nothing but the first layer has the same input
        model(ids, use_cache=False)
    first = [dict(model.model.layers[0].mlp.named_buffers()) for model in models]
    for name, buffer in first[0].items():
        if name.endswith("threshold"):
            torch.testing.assert_close(first[1][name], buffer, msg=name)
    assert runs == [0, 2] * 2


def test_nobody_may_be_chosen(device, runs):
    model = depth_model(training_routing="threshold", routing_warmup_steps=0).train()
    before = {name: value.clone() for name, value in model.model.layers[0].mlp.named_buffers()}
    for module in model.modules():
        if isinstance(module, MomaDepthRouter):
            module.threshold.fill_(2.0)
    ids = mixed_ids(3, 12)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert runs and all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)
    # an average of no token moves nothing
    for name, value in model.model.layers[0].mlp.named_buffers():
        torch.testing.assert_close(value, before[name], msg=name)


OVERFLOWING = {"fp16": (torch.float16, 4e4, 1e-2), "fp32": (torch.float32, 1e38, 1e-4)}


def model_of_one_depth_layer(**fields):
    """A first channel above 0 alone decides."""
    model = depth_model(**fields, depth_layers=[0], num_hidden_layers=1, routing_warmup_steps=0).train()
    router = model.model.layers[0].depth_router
    with torch.no_grad():
        router.weight.copy_(torch.eye(1, model.config.hidden_size))
        router.threshold.fill_(0.5)
    return model


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
@pytest.mark.parametrize("dtype", OVERFLOWING)
def test_a_token_that_would_overflow_in_a_layer_passes_it_by(device, runs, dtype, norm_placement):
    dtype, large, tolerance = OVERFLOWING[dtype]
    found, ids = [], mixed_ids(3, 12)
    for limit in (0, 2**30):
        device.setattr(token_groups_moma, "_FEW_OPERATIONS", limit)
        model = model_of_one_depth_layer(norm_placement=norm_placement, training_routing="threshold").to(dtype)
        embeds = model.get_input_embeddings()(ids).detach()
        embeds[..., 0] = embeds[..., 0].abs() + 0.1
        embeds[0, 3] = embeds[0, 4].sign() * large
        embeds[0, 3, 0] = -large
        # the layer alone: the norm behind it may overflow, too
        layer, states = model.model.layers[0], []
        layer.register_forward_hook(lambda module, args, output, states=states: states.append(output))
        model(inputs_embeds=embeds, use_cache=False)
        assert torch.equal(states[0][0, 3], embeds[0, 3])
        others = states[0].flatten(0, 1)[torch.arange(36) != 3]
        others.float().square().mean().backward()
        found.append({"states": others, **{name: weight.grad for name, weight in layer.named_parameters()}})
    assert runs == [0]
    for name, value in found[0].items():
        assert value is None or value.isfinite().all(), name
        torch.testing.assert_close(found[1][name], value, rtol=tolerance, atol=tolerance, msg=name)


def test_a_layer_that_costs_more_than_waiting_is_packed(device, runs):
    model = depth_model().train()
    config = model.config
    width = max(config.group_intermediate_size(group) for group in config.expert_groups)
    operations = 36 * config.hidden_size * (8 * config.hidden_size + 6 * width + 4 * 12)
    for limit, expected in ((operations - 1, []), (operations, [0, 2])):
        device.setattr(token_groups_moma, "_FEW_OPERATIONS", limit)
        model(mixed_ids(3, 12), use_cache=False)
        assert runs == expected


@pytest.mark.parametrize("case", ["eager", "evaluation", "own mask", "router logits", "no gradients"])
def test_elsewhere_layers_are_packed(device, runs, case):
    model, ids = depth_model().train(case != "evaluation"), mixed_ids(3, 12)
    if case == "eager":
        model.set_attn_implementation("eager")
    given = {"output_router_logits": True} if case == "router logits" else {}
    if case == "own mask":
        given["attention_mask"] = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    with torch.set_grad_enabled(case != "no gradients"):
        model(ids, use_cache=False, **given)
    assert not runs


CACHES = {
    "growing": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=40),
}


def step_all(model, ids, mask, cache, first):
    parts = [model(ids[:, :first], attention_mask=mask[:, :first], cache=cache).logits] if first else []
    for place in range(first, ids.shape[1]):
        parts.append(model(ids[:, place : place + 1], attention_mask=mask[:, : place + 1], cache=cache).logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, routing, cache, first",
    [
        ("dense", "threshold", "static", 0),
        ("dense", "token_choice", "growing", 7),
        ("4t4i", "threshold", "growing", 1),
        ("4t4i", "token_choice", "static", 7),
        ("by_modality", "threshold", "growing", 7),
        ("by_modality", "token_choice", "static", 1),
        ("wide", "threshold", "static", 7),
        ("wide", "token_choice", "growing", 0),
    ],
)
def test_masked_steps_equal_a_forward_without_a_cache(device, runs, name, routing, cache, first):
    model = depth_model(name, inference_routing=routing).eval()
    ids = mixed_ids(9, 36)
    mask = left_padding(ids, 4, 0, 1) if first == 7 else torch.ones_like(ids)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    assert not runs
    found = step_all(model, ids, mask, CACHES[cache](model.config), first)
    assert len(runs) == 2 * (36 - first * (first > 1))
    assert_near(found[mask == 1], expected[mask == 1], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [0.5, 0.25])
@pytest.mark.parametrize("cache", CACHES)
def test_a_masked_step_rarely_waits_and_its_cache_holds_what_was_chosen(device, runs, cache, capacity):
    model = depth_model(depth_capacity=capacity).eval()
    waits, tolist = [], torch.Tensor.tolist
    ids = mixed_ids(16, 36)
    cache = CACHES[cache](model.config)
    model(ids[:, :4], cache=cache)
    device.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or tolist(self))
    for place in range(4, 36):
        model(ids[:, place : place + 1], cache=cache)
    assert len(runs) == 2 * 32
    # one for the model; more than one in three steps of a layer would be no gain
    assert 32 < len(waits) <= 32 + 2 * 32 // 3
    for index in (0, 2):
        layer = cache.layers[index]
        assert layer.keys.shape[2] <= 40 and max(layer.lengths) >= int(layer.length_B.max())


@torch.no_grad()
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("cache", CACHES)
def test_masked_and_counted_steps_forks_crops_and_beams_in_any_order(device, runs, cache, seed):
    model = depth_model().eval()
    generator = torch.Generator().manual_seed(seed)
    may_mask = token_groups_moma._may_mask_depth
    ids, first = mixed_ids(9, 3), CACHES[cache](model.config)
    model(ids, cache=first)
    branches = [(ids, first)]
    for turn in range(25):
        choice = int(torch.randint(8, (1,), generator=generator))
        ids, branch = branches[int(torch.randint(len(branches), (1,), generator=generator))]
        if choice == 0 and len(branches) < 4:
            fork = copy.copy(branch)
            fork.layers = [copy.copy(layer) for layer in branch.layers]
            # the library's static layers count in place, so that their copies have to be deep
            branches.append((ids, copy.deepcopy(branch) if cache == "static" else fork))
            continue
        if choice == 1 and cache == "growing" and ids.shape[1] > 3:
            branch.crop(-1)
            changed = ids[:, :-1]
        elif choice == 2:
            order = torch.randperm(9, generator=generator)
            branch.reorder_cache(order)
            changed = ids[order]
        else:
            device.setattr(token_groups_moma, "_may_mask_depth", (lambda *a: False) if choice == 3 else may_mask)
            new = mixed_ids(9, 2 if choice == 4 else 1, seed=turn)
            changed = torch.cat([ids, new], dim=1)
            found = model(new, cache=branch).logits
            expected = model(changed, use_cache=False).logits[:, ids.shape[1] :]
            assert_near(found, expected, 1e-4)
        branches = [(changed, branch) if each is branch else (old, each) for old, each in branches]
    assert runs


@torch.no_grad()
@pytest.mark.parametrize(("rows", "capacity", "is_masked"), [(9, 0.25, False), (10, 0.25, True), (4, 0.5, True)])
def test_few_rows_are_counted_since_a_layer_may_be_skipped(device, runs, rows, capacity, is_masked):
    model = depth_model(depth_capacity=capacity).eval()
    cache, ids = DynamicCache(config=model.config), mixed_ids(rows, 5)
    model(ids[:, :4], cache=cache)
    model(ids[:, 4:], cache=cache)
    assert bool(runs) is is_masked
