# SPDX-License-Identifier: Apache-2.0
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.loss.loss_utils import ForCausalLMLoss

from helpers.reference import GROUPS, assert_near, fields_of, trainable
from helpers.tiny import mixed_ids, tiny_config, tiny_model
from modeling_moma import token_groups_moma
from modeling_moma.configuration_moma import RULES
from modeling_moma.errors_moma import InputError
from modeling_moma.loss_moma import causal_lm_loss
from modeling_moma.modeling_moma import MomaForCausalLM
from modeling_moma.token_groups_moma import token_modalities


AUXILIARY = {
    "auxiliary_routers": True,
    "inference_routing": "auxiliary",
    "num_hidden_layers": 3,
    "depth_layers": [0, 2],
    "depth_capacity": {"text": 0.5, "image": 0.25},
}
DEPTH = {"num_hidden_layers": 3, "depth_layers": [1], "depth_capacity": 0.5}


def labels_of(ids):
    labels = ids.clone()
    labels[0, :4] = -100
    return labels


def library_loss(model, logits, labels, **kwargs):
    return ForCausalLMLoss(logits, labels, vocab_size=model.config.vocab_size, **kwargs)


@pytest.mark.parametrize(
    ("training", "shifted", "divisor"), [(True, False, None), (False, True, 7), (True, True, torch.tensor(7))], ids=str
)
def test_the_plain_loss_is_that_of_transformers(training, shifted, divisor):
    # eval ignores weights and z-loss, training has none here
    fields = {"z_loss_coef": 0.0} if training else {"z_loss_coef": 0.1, "modality_loss_weights": {"text": 5.0}}
    model = tiny_model(**fields).train(training)
    ids = mixed_ids()
    labels = labels_of(ids)
    extra = {"shift_labels": F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()} if shifted else {}
    output = model(ids, labels=None if shifted else labels, num_items_in_batch=divisor, **extra)
    expected = library_loss(model, output.logits, labels, num_items_in_batch=divisor, **extra)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("name", "static", "columns"), [("4t4i", False, 1), ("4t4i", True, 4), ("dense", False, 4)])
def test_a_mask_that_is_too_short_for_the_cache_is_named(name, static, columns):
    model = tiny_model(**GROUPS[name]).eval()
    ids = mixed_ids(2, 7)
    cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    model(ids[:, :5], attention_mask=torch.ones(2, 5), cache=cache)
    with pytest.raises(ValueError, match=r"`attention_mask` has the shape \(2, \d\).*2 rows of 7 positions.*cached"):
        model(ids[:, 5:], attention_mask=torch.ones(2, columns), cache=cache)


def test_weights_and_z_loss_are_what_a_hand_computes():
    config = tiny_config(z_loss_coef=0.01, modality_loss_weights={"image": 0.25})
    logits = 3 * torch.randn(2, 12, config.vocab_size, generator=torch.Generator().manual_seed(0))
    labels = labels_of(mixed_ids())
    total, count = 0.0, 0
    for row in range(2):
        for position in range(11):
            target = labels[row, position + 1].item()
            if target == -100:
                continue
            scores = logits[row, position].tolist()
            log_z = math.log(sum(math.exp(score) for score in scores))
            weight = 0.25 if 8 <= target < 24 else 1.0
            total += weight * (log_z - scores[target]) + 0.01 * log_z**2
            count += 1
    parts = causal_lm_loss(config, logits, labels, training=True)
    assert parts.loss.item() == pytest.approx(total / count, rel=1e-5)
    assert causal_lm_loss(config, logits, labels, training=True, num_items_in_batch=5).loss.item() == pytest.approx(
        total / 5, rel=1e-5
    )


def test_modality_losses_are_means_over_their_own_targets():
    model = tiny_model(modality_loss_weights={"text": 9.0})
    ids = mixed_ids()
    labels = labels_of(ids)
    output = model(ids, labels=labels)
    for index, name in enumerate(model.config.modalities):
        mine = (labels != -100) & (token_modalities(model.config, labels) == index)
        expected = library_loss(model, output.logits, labels.masked_fill(~mine, -100))
        assert output.modality_losses[name].item() == pytest.approx(expected.item(), rel=1e-5)
        assert output.modality_tokens[name] == mine[:, 1:].sum()
        assert not output.modality_losses[name].requires_grad


@pytest.mark.parametrize("routing", RULES)
def test_embeddings_with_modalities_equal_ids(monkeypatch, routing):
    warnings = []
    monkeypatch.setattr(token_groups_moma.logger, "warning_once", warnings.append)
    model = tiny_model(**GROUPS["6t2i"], **fields_of(routing)).eval()
    ids = mixed_ids()
    embeds = model.get_input_embeddings()(ids)
    expected = model(ids, routing=routing).logits
    kinds = token_modalities(model.config, ids)
    assert_near(model(inputs_embeds=embeds, mm_token_type_ids=kinds, routing=routing).logits, expected, 1e-6)
    # without modalities all positions are text
    all_text = model(inputs_embeds=embeds, mm_token_type_ids=torch.zeros_like(kinds), routing=routing).logits
    assert not warnings
    assert torch.equal(model(inputs_embeds=embeds, routing=routing).logits, all_text)
    assert "without `mm_token_type_ids`" in warnings[0]
    assert not torch.allclose(all_text, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"input_ids": torch.tensor([[30, 40]])}, IndexError, "40.*vocabulary"),
        ({"input_ids": torch.full((1, 65), 30)}, ValueError, "max_position_embeddings"),
        ({"input_ids": torch.full((2, 0), 30)}, ValueError, "input_ids.*empty"),
        ({"input_ids": torch.full((1, 4), 30), "routing": "soft"}, ValueError, "routing.*soft"),
        ({"input_ids": [[30, 31]]}, ValueError, "`input_ids` is a list"),
        ({"input_ids": torch.full((4,), 30)}, ValueError, r"`input_ids` has the shape \(4,\).*sequence_length"),
        ({"input_ids": torch.full((1, 4), 30.0)}, ValueError, "`input_ids`.*float32.*integers"),
        ({"inputs_embeds": torch.zeros(4, 16)}, ValueError, "`inputs_embeds`.*hidden_size"),
        ({}, ValueError, "input_ids"),
        ({"input_ids": torch.full((1, 4), 30), "inputs_embeds": torch.zeros(1, 4, 16)}, ValueError, "inputs_embeds"),
        *(
            ({"inputs_embeds": torch.zeros(2, 4, 16), "mm_token_type_ids": kinds}, ValueError, match)
            for kinds, match in (
                (torch.full((2, 4), 2), "mm_token_type_ids.*2"),
                (torch.zeros(2, 4), "mm_token_type_ids.*float32.*whole numbers"),
                (torch.zeros(1, 4, dtype=torch.long), "mm_token_type_ids.*2 rows of 4 positions"),
            )
        ),
        (
            {"input_ids": torch.full((2, 4), 30), "attention_mask": torch.ones(2, 6)},
            ValueError,
            "attention_mask.*2 rows of 4 positions",
        ),
        (
            {"input_ids": torch.full((3, 2), 30), "attention_mask": torch.tensor([[1, 1], [0, 0], [0, 1]])},
            ValueError,
            "attention_mask.*row 1",
        ),
    ],
)
def test_bad_input_raises_its_own_message(arguments, error, match):
    with pytest.raises(error, match=match):
        tiny_model(**GROUPS["4t4i"])(**arguments)


def test_ids_and_labels_may_be_of_any_integers():
    model, ids = tiny_model().eval(), mixed_ids()
    assert torch.equal(model(ids.int(), labels=ids.int()).loss, model(ids, labels=ids).loss)


def test_a_static_cache_that_is_too_small_says_what_it_needs():
    model, ids, length = tiny_model().eval(), mixed_ids(), 12
    cache = StaticCache(model.config, max_cache_len=8)
    with pytest.raises(ValueError, match=f"`cache` has room for 8 positions, but there are {length}.*`max_cache_len`"):
        model(ids, cache=cache)
    model(ids[:, :7], cache=cache)
    with pytest.raises(ValueError, match="`cache` has room for 8 positions, but there are 9"):
        model(ids[:, 7:9], cache=cache)
    with pytest.raises(ValueError, match=f"`cache` has room for 8 positions, but there are {length}"):
        model.generate(ids, cache=StaticCache(model.config, max_cache_len=8), max_new_tokens=4)


def test_more_experts_per_token_than_a_group_has_raise_where_a_rule_asks_for_them():
    model = tiny_model(num_experts={"text": 4, "image": 2}, num_experts_per_tok=3).eval()
    assert torch.isfinite(model(mixed_ids()).logits).all()
    with pytest.raises(ValueError, match="`routing` = 'token_choice'.*num_experts_per_tok` = 3.*has 2"):
        model(mixed_ids(), routing="token_choice")


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"depth_layers": [0], "depth_capacity": 0.5}], ids=["full", "depth"])
def test_columns_for_later_positions_of_a_static_cache_change_no_loss(fields):
    model, ids = tiny_model(**fields).eval(), mixed_ids(2, 8)
    mask = (torch.arange(12) < 8).long().repeat(2, 1)
    mask[0, :3] = 0
    losses = []
    for width in (8, 12):
        cache = StaticCache(model.config, max_cache_len=12)
        for part, end in ((ids[:, :5], 5), (ids[:, 5:], 8)):
            given = mask[:, : end if width == 8 else width]
            losses.append(model(part, attention_mask=given, labels=part, cache=cache))
    for one, other in zip(losses[:2], losses[2:]):
        assert torch.equal(one.loss, other.loss)
        assert one.modality_tokens == other.modality_tokens


def test_a_row_with_an_earlier_token_is_not_all_padding():
    model = tiny_model(**GROUPS["4t4i"]).eval()
    ids = mixed_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    cache = model(ids[:, :3], attention_mask=mask[:, :3], use_cache=True).cache
    assert torch.isfinite(model(ids[:, 3:], attention_mask=mask, cache=cache).logits).all()


def test_scaled_rotary_embeddings_may_go_further():
    model = tiny_model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}).eval()
    assert torch.isfinite(model(torch.full((1, 100), 30)).logits).all()


@pytest.mark.parametrize(
    ("routing", "use_reentrant"), [("expert_choice", True), ("threshold", False), ("token_choice", False)]
)
def test_checkpointing_rounds_as_plain_training_does(routing, use_reentrant):
    model = tiny_model(**GROUPS["4t4i"], training_routing=routing, router_bias_update_rate=0.2).bfloat16()
    recomputed, ids = copy.deepcopy(model), mixed_ids(rows=4)
    recomputed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    losses = [each(ids, labels=ids).loss for each in (model, recomputed)]
    assert losses[0] == losses[1]
    sum(losses).backward()
    for (name, parameter), other in zip(model.named_parameters(), recomputed.parameters()):
        assert torch.equal(other.grad, parameter.grad), name


def test_a_training_step_keeps_a_cache_that_is_asked_for():
    model, ids = tiny_model(), mixed_ids()
    assert model(ids).cache is None
    assert model(ids, use_cache=True).cache.get_seq_length() == ids.shape[1]
    assert model.eval()(ids).cache.get_seq_length() == ids.shape[1]


def test_routers_stay_in_fp32(tmp_path):
    model = tiny_model(**GROUPS["4t4i"], **AUXILIARY)
    model(mixed_ids())
    model.save_pretrained(tmp_path)
    loaded = MomaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, value in loaded.state_dict().items():
        is_router = "router." in key
        assert value.dtype == (torch.float32 if is_router else torch.bfloat16), key
        if is_router:
            assert torch.equal(value, model.state_dict()[key]), key
    ids = mixed_ids()
    assert torch.isfinite(loaded.eval()(ids).logits).all()
    loaded.train()(ids, labels=ids).loss.backward()
    assert loaded.model.layers[0].mlp.groups["text"].router.weight.grad.dtype == torch.float32


def test_halving_the_weights_rounds_no_cut_and_no_counter():
    model = tiny_model(**GROUPS["4t4i"], **AUXILIARY)
    cuts = {key: value for key, value in model.state_dict().items() if key.endswith(("threshold", "num_updates"))}
    for value in cuts.values():
        value.fill_(301 / 1024)
    halved = model.bfloat16().state_dict()
    assert halved["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    for key in cuts:
        assert halved[key].dtype == torch.float32 and (halved[key] == 301 / 1024).all(), key


@torch.no_grad()
def test_a_halved_model_computes_what_it_does_once_saved_and_loaded(tmp_path):
    model = tiny_model(**GROUPS["4t4i"]).eval()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model.half().save_pretrained(tmp_path)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    ids = mixed_ids()
    assert torch.equal(model(ids).logits, MomaForCausalLM.from_pretrained(tmp_path)(ids).logits)


SAVED = {
    **{name: GROUPS[name] for name in ("dense", "8x", "6t2i", "shared", "shared_by_modality")},
    "tied": {"tie_word_embeddings": True},
    "auxiliary": AUXILIARY,
    "untied": {**DEPTH, "untied_attention": True},
    "biases_by_modality": {"num_experts": 4, "training_routing": "token_choice", "balance_bias_by_modality": True},
}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_model_loads_equal(name, tmp_path):
    model = tiny_model(**SAVED[name])
    ids = mixed_ids()
    model(ids)
    model.eval().save_pretrained(tmp_path)
    loaded, info = MomaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    # weights mapped from a file lie elsewhere in memory, and products may round differently
    assert_near(loaded(ids).logits, model(ids).logits, 1e-6)


def auxiliary_parameters(model):
    parameters = {key: value for key, value in model.named_parameters() if ".auxiliary." in key}
    # two matrices of two groups in three layers and of two depth routers
    assert len(parameters) == 2 * (2 * 3 + 2)
    return parameters


def test_auxiliary_routers_are_frozen_also_once_loaded(tmp_path):
    model = tiny_model(**AUXILIARY)
    plain = tiny_model(**{**AUXILIARY, "auxiliary_routers": False, "inference_routing": "threshold"})
    model.save_pretrained(tmp_path / "auxiliary")
    plain.save_pretrained(tmp_path / "plain")
    loaded = MomaForCausalLM.from_pretrained(tmp_path / "auxiliary")
    grown = MomaForCausalLM.from_pretrained(tmp_path / "plain", auxiliary_routers=True)
    for each in (model, loaded, grown):
        frozen = {key for key, parameter in each.named_parameters() if not parameter.requires_grad}
        assert frozen == set(auxiliary_parameters(each))


@pytest.mark.parametrize("routing", ["expert_choice", "auxiliary"])
def test_training_of_the_model_moves_no_auxiliary_router(routing):
    model = tiny_model(**{**AUXILIARY, "depth_capacity": 0.5})
    # weight decay, and frozen or not
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = mixed_ids(3, 12)
    for _ in range(2):
        model(ids, labels=ids, routing=routing).loss.backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        if ".auxiliary." in key:
            assert torch.equal(value, before[key]), key
        elif key.endswith("router.weight"):
            assert not torch.equal(value, before[key]), key


@pytest.mark.parametrize(("argument", "training"), [("routing", False), ("depth_routing", True)])
def test_a_model_without_auxiliary_routers_says_what_to_do(argument, training):
    model = tiny_model(**GROUPS["4t4i"], num_hidden_layers=3, depth_layers=[1]).train(training)
    with pytest.raises(ValueError, match="`routing`.*auxiliary_routers=True.*train-auxiliary-routers"):
        model(mixed_ids(), **{argument: "auxiliary"})


def test_a_dense_model_has_nothing_to_predict():
    model = tiny_model(num_experts=1, auxiliary_routers=True).eval()
    assert torch.equal(model(mixed_ids(), routing="auxiliary").logits, model(mixed_ids()).logits)


# in as many dimensions as heads, angles would fit the heads
@pytest.mark.parametrize("shape", [(1, 1), (2, 13), (12,), (1, 2, 12)])
def test_positions_of_another_number_of_tokens_are_refused(shape):
    model = tiny_model(num_hidden_layers=2, depth_layers=[1]).eval()
    ids = mixed_ids(2, 12)
    with pytest.raises(InputError, match=rf"`position_ids` has the shape \({shape[0]},"):
        model(ids, position_ids=torch.zeros(shape, dtype=torch.long))
    positions = torch.arange(12).unsqueeze(0)
    assert torch.equal(model(ids, position_ids=positions).logits, model(ids).logits)


def test_router_logits_come_by_layer_and_group():
    model = tiny_model(num_experts={"text": 3, "image": 2}).eval()
    ids = mixed_ids()
    text = (token_modalities(model.config, ids) == 0).sum().item()
    output = model(ids, output_router_logits=True)
    shapes = [tuple(logits.shape) for logits in output.router_logits]
    assert shapes == [(text, 3), (ids.numel() - text, 2)] * 2
    assert model(ids).router_logits is None
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = model(ids, attention_mask=mask, output_router_logits=True).router_logits
    assert sum(logits.shape[0] for logits in padded[:2]) == mask.sum()


@pytest.mark.parametrize(
    ("dtype", "fields"),
    [
        (torch.bool, {"depth_layers": [0], "depth_capacity": {"text": 0.5, "image": 0.6}}),
        (torch.uint8, {"untied_attention": True}),
        (torch.int32, {"num_experts": 4, "balance_bias_by_modality": True, "inference_routing": "token_choice"}),
    ],
)
def test_modalities_are_read_in_any_type_of_whole_numbers(fields, dtype):
    model, ids = tiny_model(**fields).eval(), mixed_ids()
    types = token_modalities(model.config, ids).to(dtype)
    with torch.no_grad():
        logits = model(inputs_embeds=model.get_input_embeddings()(ids), mm_token_type_ids=types).logits
        torch.testing.assert_close(logits, model(ids).logits)


THREE = {
    "modality_token_ranges": {"speech": [[30, 36]], "image": [[8, 24]]},
    "num_experts": {"speech": 2, "image": 3, "text": 1},
}


def test_in_training_all_weights_take_part_in_a_batch_of_one_modality():
    model = tiny_model(**THREE, untied_attention=True)
    model(torch.full((1, 4), 27), labels=torch.full((1, 4), 27)).loss.backward()
    for key, parameter in trainable(model):
        assert parameter.grad is not None, key
        if ".image." in key or ".speech." in key:
            assert not parameter.grad.any(), key


@torch.no_grad()
def test_in_inference_modalities_without_a_token_do_not_run():
    model = tiny_model(untied_attention=True).eval()
    seen = []
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *call, key=key: seen.append(key))
    model(torch.full((1, 4), 27))
    assert any("modalities.text" in key for key in seen) and not any("modalities.image" in key for key in seen)


def test_a_token_meets_the_parameters_that_it_met():
    tied, untied = (tiny_config(untied_attention=flag) for flag in (False, True))
    for modality in tied.modalities:
        counts = [config.num_parameters(active=True, modality=modality) for config in (tied, untied)]
        assert counts[0] == counts[1]
    # a second attention of four matrices of [16, 16], four norms of 8 for queries and keys, and two of 16, in 2 layers
    assert untied.num_parameters() - tied.num_parameters() == 2 * (4 * 16 * 16 + 4 * 8 + 2 * 16)
