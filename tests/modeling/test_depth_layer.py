# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers.cache_utils import DynamicCache

from helpers.depth_reference import SelectionLog
from helpers.reference import GROUPS, assert_near, fields_of
from helpers.tiny import left_padding, mixed_ids, tiny_model
from modeling_moma.errors_moma import InputError


DEPTH = {"num_hidden_layers": 3, "depth_layers": [0, 2], "depth_capacity": 0.5}
VARIANTS = {
    "dense": GROUPS["dense"],
    "dense_pre": {**GROUPS["dense"], "norm_placement": "pre"},
    "1t1i_pre": {**GROUPS["1t1i"], "norm_placement": "pre"},
    "4t4i": GROUPS["4t4i"],
    "by_modality": {**GROUPS["4t4i"], "depth_capacity": {"text": 0.3, "image": 0.6}},
    "shared": GROUPS["shared"],
}


def depth_model(name="4t4i", **fields):
    # a large eps keeps RMSNorm from cancelling gates, and their gradients from vanishing
    defaults = {**DEPTH, "routing_warmup_steps": 0, "rms_norm_eps": 0.3}
    model = tiny_model(**{**defaults, **VARIANTS[name], **fields})
    for index in model.config.depth_layers:
        router = model.model.layers[index].depth_router
        router.threshold.copy_(torch.linspace(0.4, 0.6, router.threshold.numel()))
        router.balance_bias.copy_(torch.linspace(-0.1, 0.1, router.threshold.numel()))
    return model


class LayerLog:
    """What came into and out of the depth layers."""

    def __init__(self, model):
        self.pairs = {index: [] for index in model.config.depth_layers}
        for index in model.config.depth_layers:
            model.model.layers[index].register_forward_hook(self._hook(index))

    def _hook(self, index):
        return lambda module, args, output: self.pairs[index].append((args[0], output))


@pytest.mark.parametrize(
    ("name", "routing", "training", "dtype"),
    [
        ("4t4i", "expert_choice", True, torch.float32),
        ("4t4i", "threshold", False, torch.bfloat16),
        ("dense_pre", "token_choice", True, torch.bfloat16),
        ("dense_pre", "auxiliary", False, torch.float32),
    ],
)
def test_tokens_that_pass_by_leave_bit_by_bit_as_they_came(name, routing, training, dtype):
    model = depth_model(name, **fields_of(routing)).to(dtype).train(training)
    layers, selections = LayerLog(model), SelectionLog(model)
    ids = mixed_ids(3, 12)
    model(ids, attention_mask=left_padding(ids, 5, 1), routing=routing)
    for index in DEPTH["depth_layers"]:
        ((before, after),), (chosen_BT,) = layers.pairs[index], selections.chosen[index]
        assert 0 < chosen_BT.sum() < ids.numel()
        assert torch.equal(after[~chosen_BT], before[~chosen_BT])
        assert (after != before).any(-1)[chosen_BT].all()


@pytest.mark.parametrize(
    ("name", "routing", "checkpointing", "attention"),
    [
        ("dense", "threshold", False, "sdpa"),
        ("1t1i_pre", "token_choice", True, "eager"),
        ("4t4i", "threshold", True, "sdpa"),
        ("by_modality", "threshold", False, "eager"),
        ("shared", "token_choice", False, "sdpa"),
    ],
)
def test_without_a_chosen_token_all_weights_get_gradients(name, routing, checkpointing, attention):
    model = depth_model(name, training_routing=routing)
    model.set_attn_implementation(attention)
    if checkpointing:
        model.activation_checkpointing_enable()
    for index in DEPTH["depth_layers"]:
        router = model.model.layers[index].depth_router
        router.threshold.fill_(2.0)
        router.balance_bias.fill_(-2.0)
    selections = SelectionLog(model)
    ids = mixed_ids()
    loss = model(ids, labels=ids, attention_mask=left_padding(ids, 3), use_cache=False).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert not any(chosen.any() for calls in selections.chosen.values() for chosen in calls)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        if key.startswith(("model.layers.0.", "model.layers.2.")):
            assert not parameter.grad.any(), key


# lengths of the documents of two rows
LAYOUTS = {"two": [[5, 7], [9, 3]], "many": [[1, 4, 2, 5], [3, 3, 3, 3]], "one and several": [[12], [4, 8]]}


def restarting_positions(layout):
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in layout])


def own_mask(is_seen_BTT, form):
    mask = is_seen_BTT[:, None]
    return mask if form == "bool" else torch.where(mask, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    ("attention", "form", "rows_of_mask"),
    [("sdpa", "bool", "one"), ("sdpa", "additive", "all"), ("eager", "additive", "one")],
)
def test_the_callers_own_mask_may_pack_documents(form, attention, rows_of_mask):
    model = depth_model().eval()
    model.set_attn_implementation(attention)
    ids = mixed_ids()
    layout = LAYOUTS["two"] if rows_of_mask == "all" else [[5, 7]] * 2
    positions = restarting_positions(layout)
    document_BT = (positions == 0).cumsum(1)
    own = torch.ones(12, 12, dtype=torch.bool).tril() & (document_BT[:, :, None] == document_BT[:, None])
    if rows_of_mask == "one":
        own = own[:1]
    expected = model(ids, position_ids=positions, use_cache=False).logits
    logits = model(ids, attention_mask=own_mask(own, form), position_ids=positions).logits
    assert_near(logits, expected, 1e-5)


@pytest.mark.parametrize(("depth_layers", "dtype"), [(None, torch.bool), ([0], torch.long)], ids=str)
def test_the_callers_own_mask_of_a_type_that_would_be_added_as_numbers_is_refused(dtype, depth_layers):
    model = tiny_model(depth_layers=depth_layers).eval()
    model.set_attn_implementation("eager")
    own = torch.ones(2, 1, 12, 12).tril().to(dtype)
    with pytest.raises(InputError, match=f"`attention_mask` has .* the dtype {dtype} for 2 rows"):
        model(mixed_ids(), attention_mask=own)


@pytest.mark.parametrize(
    ("shape", "depth_layers"), [((12,), None), ((2, 12, 12), [0]), ((2, 1, 11, 12), None), ((3, 1, 12, 12), [0])]
)
def test_a_mask_of_another_form_is_refused(shape, depth_layers):
    model = tiny_model(depth_layers=depth_layers).eval()
    with pytest.raises(InputError, match=rf"`attention_mask` has the shape \({shape[0]},.*2 rows of 12"):
        model(mixed_ids(), attention_mask=torch.ones(shape))


def check_attentions(attentions, selections, seen, first):
    """Every layer's weights `[B, H, T, seen]` of queries that start at position `first`."""
    for index, chosen_BT in selections.items():
        weights = attentions[index]
        query_BT = chosen_BT[:, first:]
        assert weights.shape == (query_BT.shape[0], 2, query_BT.shape[1], seen)
        rows = weights.transpose(1, 2)
        assert not rows[~query_BT].any()
        assert torch.allclose(rows[query_BT].sum(-1), torch.ones(()), atol=1e-5)
        is_seen = torch.ones(seen, seen, dtype=torch.bool).tril()[first:] & chosen_BT[:, None]
        assert not weights.masked_select(~is_seen[:, None].expand_as(weights)).any()
        assert (weights.masked_select((is_seen & query_BT[..., None])[:, None].expand_as(weights)) > 0).all()


def test_cached_steps_give_attention_weights_over_all_positions_seen():
    model = depth_model().eval()
    model.set_attn_implementation("eager")
    log = SelectionLog(model)
    ids = mixed_ids(3, 12)
    full = model(ids, use_cache=False, output_attentions=True).attentions
    chosen = {index: calls[-1] for index, calls in log.chosen.items()}
    check_attentions(full, chosen, seen=12, first=0)
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], cache=cache)
    for seen in range(7, 13):
        steps = model(ids[:, seen - 1 : seen], cache=cache, output_attentions=True).attentions
        assert [tuple(weights.shape) for weights in steps] == [(3, 2, 1, seen)] * 3
        check_attentions(steps, {index: c[:, :seen] for index, c in chosen.items()}, seen=seen, first=seen - 1)
        for step, whole in zip(steps, full):
            assert_near(step, whole[:, :, seen - 1 : seen, :seen], 1e-5)


def test_attention_weights_are_there_when_no_token_is_chosen():
    model = depth_model().eval()
    model.set_attn_implementation("eager")
    for index in DEPTH["depth_layers"]:
        model.model.layers[index].depth_router.threshold.fill_(2.0)
    cache = DynamicCache(config=model.config)
    ids = mixed_ids()
    for part, seen in ((ids[:, :11], 11), (ids[:, 11:], 12)):
        attentions = model(part, cache=cache, output_attentions=True).attentions
        assert [tuple(weights.shape) for weights in attentions] == [(2, 2, part.shape[1], seen)] * 3
        assert not attentions[0].any() and attentions[1].any()


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0], ids=["all chosen", "some chosen", "none chosen"])
def test_every_layer_gives_router_logits_whoever_is_chosen(threshold):
    model, ids = depth_model().eval(), mixed_ids(2, 6)
    routers = [model.model.layers[index].depth_router for index in model.config.depth_layers]
    for router in routers:
        router.threshold.fill_(threshold)
    num_groups = len(model.config.expert_groups)
    cache, plain = (DynamicCache(config=model.config) for _ in range(2))
    for part in (ids[:, :5], ids[:, 5:]):
        output = model(part, cache=cache, output_router_logits=True)
        assert len(output.router_logits) == model.config.num_hidden_layers * num_groups
        assert_near(output.logits, model(part, cache=plain).logits, 1e-5)
        first = output.router_logits[:num_groups]
        if threshold != 0.5:
            assert sum(logits.shape[0] for logits in first) == (part.numel() if threshold == 0 else 0)
        assert output.attentions is None
