# SPDX-License-Identifier: Apache-2.0
import math
from fractions import Fraction
from functools import partial

import pytest
import torch

from helpers.reference import (
    GROUPS,
    assert_near,
    context_of,
    fields_of,
    reference_cut,
    reference_feed_forward,
    reference_gated_feed_forward,
    reference_selection,
    trainable,
)
from helpers.tiny import IMAGE_IDS, left_padding, mixed_ids, randomize_auxiliary, tiny_config, tiny_model
from modeling_moma import routing_moma
from modeling_moma.configuration_moma import RULES
from modeling_moma.modeling_moma import MomaFeedForward
from modeling_moma.routing_moma import MomaRouter, update_routers
from modeling_moma.token_groups_moma import token_modalities


ROWS, LENGTH = 2, 10


def feed_forward(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    config = tiny_config(**kwargs)
    layer = MomaFeedForward(config)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5)
        if ".router." not in name:
            parameter.data = parameter.data.to(dtype)
    for name, buffer in layer.named_buffers():
        if name.endswith("balance_bias"):
            buffer.copy_(torch.randn_like(buffer) * 0.2)
        elif name.endswith("threshold"):
            buffer.copy_(0.4 + 0.2 * torch.rand_like(buffer))
    randomize_auxiliary(layer)
    config._experts_implementation = "moma"
    return config, layer


def hidden(config, dtype=torch.float32):
    return torch.randn(ROWS, LENGTH, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(layer, output, x):
    """Gradients of the input and of every parameter, as if none were frozen."""
    names, parameters = zip(*layer.named_parameters())
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad((output.float() * weight).sum(), [x, *parameters], allow_unused=True)
    return dict(zip(["input", *names], grads))


def assert_same_gradients(actual, expected, relative):
    for key, gradient in actual.items():
        if ".auxiliary." in key:
            # who takes a token is no smooth function of anything
            assert gradient is None and expected[key] is None, key
        elif expected[key] is None:
            assert gradient is not None and not gradient.any(), key
        else:
            assert_near(gradient, expected[key], relative)


@pytest.mark.parametrize("routing", RULES)
@pytest.mark.parametrize(
    ("name", "dtype", "relative"),
    [
        *((name, torch.float32, 1e-5) for name in ("8x", "6t2i", "shared_by_modality", "two_per_token")),
        *((name, torch.bfloat16, 2e-2) for name in ("1t1i", "shared")),
    ],
)
def test_every_routing_equals_the_plain_loop(name, routing, dtype, relative):
    fields = GROUPS.get(name, {"num_experts": {"text": 4, "image": 2}, "num_experts_per_tok": 2})
    config, layer = feed_forward(dtype, **fields, **fields_of(routing))
    layer.requires_grad_(True)
    modality_BT = token_modalities(config, mixed_ids(ROWS, LENGTH))
    padding_BT = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    padding_BT[0, :3] = True
    x, x_reference = (hidden(config, dtype).requires_grad_() for _ in range(2))
    output, _ = layer(x, context_of(config, modality_BT, routing, padding_BT))
    expected = reference_feed_forward(layer, x_reference, modality_BT, routing, padding_BT)
    assert_near(output, expected, relative)
    assert_same_gradients(gradients(layer, output, x), gradients(layer, expected, x_reference), relative)


@pytest.mark.parametrize(
    ("name", "routing"),
    [
        ("8x", "expert_choice"),
        ("4t4i", "threshold"),
        ("4t4i", "token_choice"),
        ("shared", "auxiliary"),
        ("shared_by_modality", "expert_choice"),
    ],
)
def test_normalized_gates_equal_the_plain_loop(name, routing):
    fields = {**GROUPS[name], "norm_placement": "post", "gate_after_norm": True, "normalize_gates": True}
    config, layer = feed_forward(**fields, **fields_of(routing))
    layer.requires_grad_(True)
    modality_BT = token_modalities(config, mixed_ids(ROWS, LENGTH))
    x, x_reference = (hidden(config).requires_grad_() for _ in range(2))
    output, gate = layer(x, context_of(config, modality_BT, routing))
    expected, expected_gate = reference_gated_feed_forward(layer, x_reference, modality_BT, routing)
    assert_near(output, expected, 1e-5)
    assert_near(gate, expected_gate, 1e-6)
    # without shared experts a token that somebody took weighs 1, whoever took it
    if "shared" not in name:
        assert torch.allclose(gate, gate.round()) and 0 < gate.sum() <= ROWS * LENGTH
    # as the layer norm before the gate leaves it: both the output and the gate count
    actual, wanted = output * gate, expected * expected_gate
    assert_same_gradients(gradients(layer, actual, x), gradients(layer, wanted, x_reference), 1e-5)


@pytest.mark.parametrize(("routing", "name"), zip(RULES, ("6t2i", "8x", "6t2i", "8x")))
def test_padding_competes_for_nothing(name, routing):
    ids = mixed_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 9:] = 0
    poisoned = torch.where(mask == 0, (ids + 7) % 40, ids)
    outputs, states = [], []
    for batch in (ids, poisoned):
        model = tiny_model(**GROUPS[name], **fields_of(routing))
        logits = model(batch, attention_mask=mask, routing=routing).logits
        outputs.append(logits[mask == 1])
        states.append({key: value for key, value in model.state_dict().items() if "router" in key})
    assert_near(outputs[1], outputs[0], 1e-5)
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], atol=1e-6), key


@pytest.mark.parametrize(("routing", "token"), zip(RULES, (30, 10, 30, 10)))
def test_a_batch_may_lack_a_modality(token, routing):
    ids = torch.full((2, 6), token)
    model = tiny_model(**GROUPS["4t4i"], **fields_of(routing))
    output = model(ids, labels=ids, routing=routing)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    for name, parameter in trainable(model):
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    absent = "image" if ids[0, 0] == 30 else "text"
    for layer in model.model.layers:
        router = layer.mlp.groups[absent].router
        assert router.num_updates == 0
        assert (router.threshold == 0.5).all()


def test_the_capacity_is_that_of_the_decimal_factor():
    for factor in (0.07, 0.14, 0.28, 0.55, 0.56, 0.57, 1.0, 1.1, 1.15, 1.7, 2.3):
        for num_experts in (3, 4, 6, 7):
            router = MomaRouter(tiny_config(num_experts=num_experts, expert_capacity_factor=factor), "all")
            for num_tokens in range(400):
                exact = math.ceil(Fraction(str(factor)) * num_tokens / num_experts)
                assert router.capacity(num_tokens) == min(num_tokens, exact), (factor, num_experts, num_tokens)


def batch_cuts(model, ids, routing):
    """The cut of each expert in each layer, by plain sorting."""
    output = model(ids, output_router_logits=True, routing=routing)
    routers = [layer.mlp.groups["all"].router for layer in model.model.layers]
    scores = [torch.sigmoid(logits).t().tolist() for logits in output.router_logits]
    takes = [router.capacity(ids.numel()) for router in routers]
    return [torch.tensor([reference_cut(line, take) for line in lines]) for lines, take in zip(scores, takes)]


@pytest.mark.parametrize("routing", RULES)
def test_the_threshold_is_the_running_mean_of_the_cuts(routing):
    model = tiny_model(num_experts=4, threshold_momentum=0.6, **fields_of(routing))
    routers = [layer.mlp.groups["all"].router for layer in model.model.layers]
    expected = None
    for step in range(5):
        cuts = batch_cuts(model, mixed_ids(seed=step), routing)
        decay = min(0.6, step / (step + 1))
        # the first step is copied, the next ones are a plain mean until the momentum is lower
        expected = cuts if step == 0 else [decay * old + (1 - decay) * new for old, new in zip(expected, cuts)]
        for router, value in zip(routers, expected):
            assert torch.allclose(router.threshold, value, atol=1e-6)
            assert router.num_updates == step + 1


DEPTH = {**GROUPS["4t4i"], "num_hidden_layers": 3, "depth_layers": [0, 2], "depth_capacity": 0.5}
OVERFLOWING = {
    "8x": GROUPS["8x"],
    "4t4i": GROUPS["4t4i"],
    "depth": DEPTH,
    "depth_by_modality": {**DEPTH, "depth_capacity": {"text": 0.3, "image": 0.6}},
}


def train_step(model, ids, added=0.0):
    """A training forward, and what routers keep of it; `added` comes to one token."""
    embeds = model.get_input_embeddings()(ids).detach()
    embeds[0, 3] += added
    model(inputs_embeds=embeds, mm_token_type_ids=token_modalities(model.config, ids), use_cache=False)
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "router." in name}


@pytest.mark.parametrize(
    ("name", "routing", "num_steps"),
    [
        ("8x", "token_choice", 0),
        ("4t4i", "expert_choice", 2),
        ("4t4i", "threshold", 0),
        ("depth", "token_choice", 2),
        ("depth_by_modality", "threshold", 2),
        ("8x_by_modality", "token_choice", 2),
    ],
)
def test_scores_that_are_no_numbers_move_no_router(name, routing, num_steps):
    fields = {**GROUPS["8x"], "balance_bias_by_modality": True} if name == "8x_by_modality" else OVERFLOWING[name]
    model, ids = tiny_model(**fields, training_routing=routing), mixed_ids()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "router." in name}
    for _ in range(num_steps):
        before = train_step(model, ids)
    after = train_step(model, ids, math.inf)
    assert all(buffer.isfinite().all() for buffer in after.values())
    for key, buffer in after.items():
        # depth layers pass such tokens by, of which there is one alone in the first layer
        if not model.config.depth_layers or "layers.1." in key or "layers.2.depth_router" in key:
            assert torch.equal(buffer, before[key]), key
    moved = train_step(model, ids)
    updates = [moved[key] for key in moved if "layers.1." in key and key.endswith("num_updates")]
    assert updates and all(number == num_steps + 1 for number in updates)


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_a_process_whose_scores_are_no_numbers_does_not_count(monkeypatch, routing):
    build, ids, sent = partial(tiny_model, **DEPTH, training_routing=routing), mixed_ids(), []
    expected = train_step(build(), ids)
    monkeypatch.setattr(routing_moma, "is_distributed", lambda: True)
    monkeypatch.setattr(routing_moma.dist, "all_reduce", lambda flat: sent.append(flat.clone()))
    train_step(build(), ids.flip(0), math.inf)
    assert sent[0].isfinite().all()
    monkeypatch.setattr(routing_moma.dist, "all_reduce", lambda flat: flat.add_(sent[0]))
    found = train_step(build(), ids)
    for key, buffer in expected.items():
        if "layers.1." in key or "depth_router" in key:
            torch.testing.assert_close(found[key], buffer, msg=key)


def test_threshold_in_its_warm_up_takes_as_many_of_equal_tokens_as_expert_choice():
    config, layer = feed_forward(num_experts=4)
    router = layer.groups["all"].router
    x_ND = torch.randn(1, config.hidden_size).expand(9, -1)
    modality_BT = torch.zeros(1, 9, dtype=torch.long)
    _, chosen = router(x_ND, context_of(config, modality_BT, "expert_choice", track=True))
    _, pairs = router(x_ND, context_of(config, modality_BT, "threshold", track=True))
    expected = sorted((token, expert) for expert, row in enumerate(chosen.token_EK.tolist()) for token in row)
    assert sorted(zip(pairs.token_P.tolist(), pairs.expert_P.tolist())) == expected


def test_token_choice_bias_moves_towards_balance():
    model = tiny_model(num_experts=4, training_routing="token_choice", router_bias_update_rate=0.02)
    router, counts = model.model.layers[0].mlp.groups["all"].router, []
    router.register_forward_hook(lambda module, args, output: counts.append(output[1].expert_P.bincount(minlength=4)))
    # one expert is everybody's favourite
    router.balance_bias[0] = 1.0
    before, ids = router.balance_bias.clone(), mixed_ids(4, 16)
    model(ids)
    step = router.balance_bias - before
    assert step[0] == pytest.approx(-0.02, abs=1e-6) and (step[1:] > 0).all()
    for _ in range(80):
        model(ids)
    assert counts[0].tolist() == [64, 0, 0, 0]
    assert counts[-1].max() < 32


def test_a_probability_at_the_threshold_is_taken():
    config, layer = feed_forward(num_experts=4, auxiliary_routers=True)
    router = layer.groups["all"].router
    router.auxiliary.threshold.fill_(0.5)
    # exactly one half for every expert
    router.auxiliary.down_proj.weight.zero_()
    context = context_of(config, torch.zeros(1, 3, dtype=torch.long), "auxiliary")
    assert router(torch.randn(3, config.hidden_size), context)[1].token_P.shape == (12,)
    router.auxiliary.threshold[1] = 0.6
    assert set(router(torch.randn(3, config.hidden_size), context)[1].expert_P.tolist()) == {0, 2, 3}


def test_the_auxiliary_router_computes_in_fp32_under_autocast_and_in_a_bf16_model():
    config, layer = feed_forward(num_experts=4, auxiliary_routers=True)
    auxiliary = layer.groups["all"].router.auxiliary
    x_ND = torch.randn(5, config.hidden_size).bfloat16()
    expected = auxiliary(x_ND.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(auxiliary(x_ND), expected)
    rounded = auxiliary.to(torch.bfloat16)(x_ND)
    assert rounded.dtype == torch.float32
    assert_near(rounded, expected, 2e-2)
    # only the weights were rounded, not the products
    assert not torch.equal(rounded, rounded.bfloat16().float())


# one pool of experts with a selection bias for each modality
BIASES = {"num_experts": 4, "training_routing": "token_choice", "balance_bias_by_modality": True}
SPEECH = {"modality_token_ranges": {"speech": [[30, 36]], "image": [list(IMAGE_IDS)]}}
RATE = 0.02


@pytest.mark.parametrize(("fields", "padding"), [({}, 4), ({"num_experts_per_tok": 2}, 0), (SPEECH, 4)])
def test_a_step_moves_each_bias_by_the_load_of_its_modality(fields, padding):
    torch.manual_seed(0)
    config = tiny_config(**BIASES, **fields)
    router = MomaRouter(config, "all")
    torch.nn.init.normal_(router.weight)
    router.balance_bias.normal_(std=0.2)
    before = router.balance_bias.clone()
    ids = mixed_ids(3, 10)
    mask = left_padding(ids, padding)
    modality_BT = token_modalities(config, ids)
    context = context_of(config, modality_BT, "token_choice", mask == 0, track=True)
    x_ND = context.split.split(torch.randn(*ids.shape, config.hidden_size))["all"]
    logits, _ = router(x_ND, context)
    modality_N = modality_BT[mask == 1].tolist() if padding else modality_BT.flatten().tolist()
    pairs = reference_selection(router, torch.sigmoid(logits), "token_choice", x_ND, modality_N)
    expected = before.clone()
    for modality in range(len(config.modalities)):
        load = [sum(e == expert and modality_N[t] == modality for t, e in pairs) for expert in range(4)]
        mean = sum(load) / 4
        for expert in range(4):
            expected[modality, expert] += RATE * ((load[expert] < mean) - (load[expert] > mean))
    update_routers(context, RATE)
    assert torch.allclose(router.balance_bias, expected, atol=1e-6)
    assert not torch.equal(router.balance_bias, before) and router.num_updates == 1


def test_a_modality_without_a_token_moves_no_bias():
    model = tiny_model(**BIASES, router_bias_update_rate=RATE)
    model(torch.full((2, 6), 30))
    for layer in model.model.layers:
        bias = layer.mlp.groups["all"].router.balance_bias
        assert bias[0].any() and not bias[1].any()
