# SPDX-License-Identifier: Apache-2.0
"""No token without an expert, `config.cover_all_tokens`."""

import pytest
import torch
from transformers import StaticCache

from helpers.depth_reference import assert_equals_plain_loop
from helpers.reference import GROUPS, assert_near, context_of, fields_of, trainable
from helpers.tiny import IMAGE_IDS, left_padding, mixed_ids, tiny_config, tiny_model
from modeling_moma import MomaForCausalLM
from modeling_moma.calibration.thresholds import calibrate_thresholds
from modeling_moma.configuration_moma import RULES
from modeling_moma.planning.costs import flops_per_token
from modeling_moma.planning.memory import experts_per_token
from modeling_moma.routing_moma import MomaRouter


DEPTH = {"num_hidden_layers": 3, "depth_layers": [0, 2], "depth_capacity": 0.5}
THREE = {
    "modality_token_ranges": {"speech": [[30, 36]], "image": [list(IMAGE_IDS)]},
    "num_experts": {"speech": 2, "image": 3, "text": 1},
}
VARIANTS = {
    **{name: GROUPS[name] for name in ("8x", "4t4i", "6t2i", "shared")},
    "normalized": {**GROUPS["4t4i"], "normalize_gates": True},
    "three": THREE,
    "depth": {**GROUPS["4t4i"], **DEPTH},
}
LEAVING = sorted(set(RULES) - {"token_choice"})


def covered_model(name="4t4i", cover=True, **fields):
    """A model most of whose experts take few tokens."""
    defaults = {"rms_norm_eps": 0.3, "routing_warmup_steps": 0, "expert_capacity_factor": 0.5}
    model = tiny_model(**{**defaults, **VARIANTS[name], "cover_all_tokens": cover, **fields})
    for key, buffer in model.named_buffers():
        if key.endswith("depth_router.threshold"):
            buffer.fill_(0.5)
        elif key.endswith("router.threshold"):
            buffer.copy_(torch.linspace(0.5, 0.8, buffer.numel()))
    return model


def selections_of(model, *args, **kwargs):
    """The expert routers' selections of one forward, with their logits."""
    found = []
    routers = [module for module in model.modules() if isinstance(module, MomaRouter)]
    handles = [router.register_forward_hook(lambda module, inputs, output: found.append(output)) for router in routers]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


# each variant by one rule in training and by another in inference
CASES = [
    (name, list(RULES)[(index + 2 * training) % len(RULES)], training)
    for index, name in enumerate(VARIANTS)
    for training in (True, False)
]


@pytest.mark.parametrize("name, routing, training", CASES)
def test_a_model_equals_the_plain_loop_forward_and_backward(name, routing, training):
    ids = mixed_ids(3, 10)
    model = covered_model(name, **fields_of(routing)).train(training)
    assert_equals_plain_loop(model, ids, left_padding(ids, 3, 0, 4), routing, floor=3e-2)


@pytest.mark.parametrize("fixed, allow_host_sync", [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("routing", LEAVING)
def test_every_token_meets_an_expert_in_every_form_of_pairs(routing, fixed, allow_host_sync):
    torch.manual_seed(0)
    config = tiny_config(num_experts=4, **fields_of(routing))
    router = MomaRouter(config, "all")
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    router.threshold.fill_(0.8)
    if router.auxiliary is not None:
        router.auxiliary.threshold.fill_(0.9)
    modality_BT = torch.zeros(1, 40, dtype=torch.long)
    x_ND = torch.randn(40, 16)
    logits, chosen = router(x_ND, context_of(config, modality_BT, routing))
    scores = torch.sigmoid(logits)
    selection = chosen.with_fallback_expert(scores, fixed, allow_host_sync)
    columns = (selection.token_P, selection.expert_P, selection.weight_P)
    pairs = {(t, e): weight for t, e, weight in zip(*(column.tolist() for column in columns)) if weight > 0}
    expected = set(zip(chosen.token_P.tolist(), chosen.expert_P.tolist()))
    left = set(range(40)) - {token for token, _ in expected}
    assert left
    expected |= {(token, scores[token].argmax().item()) for token in left}
    assert pairs.keys() == expected
    for (token, expert), weight in pairs.items():
        assert weight == scores[token, expert].item()
    # expert by expert, as matmuls want them
    assert selection.is_sorted
    number = len(expected) if selection.ends_E is not None else selection.expert_P.numel()
    assert (selection.expert_P[:number].diff() >= 0).all()
    assert selection.chosen is chosen


def test_training_moves_thresholds_as_if_no_token_had_been_added():
    ids, states = mixed_ids(4, 16), []
    for cover in (True, False):
        # one layer, so that what it adds meets no other router
        model = covered_model("4t4i", cover, num_hidden_layers=1)
        model(ids)
        states.append({key: value for key, value in model.state_dict().items() if "router" in key})
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@torch.no_grad()
@pytest.mark.parametrize("routing", LEAVING)
def test_a_token_that_nobody_takes_goes_where_training_would_have_sent_it(routing):
    """To the highest score, whatever the thresholds are."""
    model = covered_model(num_hidden_layers=1, auxiliary_routers=True).eval()
    for key, buffer in model.named_buffers():
        if key.endswith("threshold"):
            buffer.fill_(2.0)
    ids = mixed_ids(4, 16)
    for logits, selection in selections_of(model, ids, routing=routing):
        experts = torch.zeros(logits.shape[0], dtype=torch.long).scatter(0, selection.token_P, selection.expert_P)
        only = torch.bincount(selection.token_P, minlength=logits.shape[0]) == 1
        assert selection.token_P.unique().numel() == logits.shape[0]
        if routing == "expert_choice":
            left = torch.isin(torch.arange(logits.shape[0]), selection.chosen.token_P, invert=True)
            assert left.any()
        else:
            left = only
            assert left.all()
        assert torch.equal(experts[left], logits.argmax(-1)[left])


@torch.no_grad()
@pytest.mark.parametrize("routing", ["threshold", "auxiliary"])
@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_one_by_one_equal_whole_rows_with_growing_and_static_caches(name, routing):
    model = covered_model(name, inference_routing=routing, **fields_of(routing)).eval()
    ids = mixed_ids(3, 10)
    mask = left_padding(ids, 3, 0, 4)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    for cache in (None, StaticCache(model.config, max_cache_len=16)):
        outputs = model(ids[:, :5], attention_mask=mask[:, :5], cache=cache, use_cache=True)
        for place in range(5, ids.shape[1]):
            outputs = model(
                ids[:, place : place + 1], attention_mask=mask[:, : place + 1], cache=outputs.cache, use_cache=True
            )
            assert_near(outputs.logits[:, 0], expected[:, place], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("routing", ["threshold", "auxiliary"])
def test_later_tokens_move_no_earlier_logit(routing):
    model = covered_model(**fields_of(routing)).eval()
    ids = mixed_ids(2, 12)
    other = torch.cat([ids[:, :6], mixed_ids(2, 6, seed=1)], dim=1)
    assert_near(model(other, routing=routing).logits[:, :6], model(ids, routing=routing).logits[:, :6], 1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("routing", ["expert_choice", "threshold"])
def test_checkpointing_gives_the_same_gradients(routing, use_reentrant):
    ids, results = mixed_ids(2, 12), []
    for checkpointing in (False, True):
        model = covered_model("depth", training_routing=routing, threshold_momentum=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(ids, labels=ids).loss.backward()
        results.append({key: value.grad for key, value in trainable(model)})
    for key, gradient in results[0].items():
        assert_near(results[1][key], gradient, 1e-5, floor=1e-3)


def test_calibration_finds_the_thresholds_of_what_experts_choose():
    batches = [{"input_ids": mixed_ids(4, 16, seed=seed)} for seed in range(2)]
    found = []
    for cover in (True, False):
        model = covered_model("4t4i", cover, num_hidden_layers=1).eval()
        calibrate_thresholds(model, batches)
        found.append({key: value for key, value in model.state_dict().items() if key.endswith("router.threshold")})
    for key, value in found[0].items():
        assert torch.allclose(value, found[1][key], atol=1e-6), key


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_model(tmp_path):
    model = covered_model("three").eval()
    model.save_pretrained(tmp_path)
    loaded = MomaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.cover_all_tokens
    assert_near(loaded(mixed_ids()).logits, model(mixed_ids()).logits, 1e-6)
    loaded.config.cover_all_tokens = False
    plain = MomaForCausalLM(loaded.config).eval()
    plain.load_state_dict(model.state_dict())
    assert (plain(mixed_ids()).logits - model(mixed_ids()).logits).abs().max() > 1e-3


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 4.0])
def test_costs_count_the_share_that_independent_experts_leave(factor):
    """As a router does whose scores of one expert tell nothing of those of another."""
    fields = {"num_experts": 4, "hidden_size": 64, "head_dim": 8, "expert_capacity_factor": factor}
    plain, config = tiny_config(**fields), tiny_config(**fields, cover_all_tokens=True)
    left = (1 - factor / 4) ** 4
    assert config.group_experts_per_token("all") == pytest.approx(factor + left)
    assert experts_per_token(config) == pytest.approx(factor + left)
    expert = 3 * 64 * 32
    flops = [flops_per_token(each, "text", 8) for each in (plain, config)]
    assert flops[1] - flops[0] == pytest.approx(2 * 2 * expert * left)
    assert config.num_parameters() == plain.num_parameters()
    more = config.num_parameters(active=True) - plain.num_parameters(active=True)
    assert more == pytest.approx(2 * expert * left, abs=1)
    torch.manual_seed(0)
    router = MomaRouter(config, "all")
    torch.nn.init.orthogonal_(router.weight)
    context = context_of(config, torch.zeros(1, 4000, dtype=torch.long), "expert_choice")
    _, selection = router(torch.randn(4000, 64), context)
    assert selection.token_P.numel() / 4000 == pytest.approx(factor + left, rel=0.02)
