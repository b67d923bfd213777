# SPDX-License-Identifier: Apache-2.0
import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from helpers.reference import GROUPS, assert_near, reference_group, swiglu
from helpers.tiny import mixed_ids, tiny_config, tiny_model
from helpers.upcycling import (
    CASES,
    DEPTH,
    FOUR_EACH,
    group_of,
    groups_of,
    matrices,
    run_group,
    tokens,
    trained_seed,
)
from modeling_moma import parse_experts, upcycle, upcycled_config


@pytest.mark.parametrize(
    "name, expected",
    [
        ("6t2i", {"text": 6, "image": 2}),
        ("4i16t", {"text": 16, "image": 4}),
        ("8x", 8),
    ],
)
def test_names_of_the_paper_are_read(name, expected):
    assert parse_experts(name) == expected


def test_names_of_a_third_modality_are_read():
    assert parse_experts("4t2i8a", ["text", "image", "audio"]) == {"text": 4, "image": 2, "audio": 8}
    with pytest.raises(ValueError, match="4t4i4a"):
        parse_experts("4t2i", ["text", "image", "audio"])


@pytest.mark.parametrize("name", ["4t", "4t4t", "4x4i", "t4i", "4T4I", "", "8x\n"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="`name`"):
        parse_experts(name)


def test_modalities_that_begin_alike_are_refused():
    with pytest.raises(ValueError, match="begin alike"):
        parse_experts("4t4i", ["text", "image", "ink"])


@pytest.mark.parametrize("case", CASES)
def test_experts_are_copies_and_all_else_is_taken_bit_by_bit(case):
    fields, target = CASES[case]
    seed = trained_seed(**fields)
    before = copy.deepcopy(seed.state_dict())
    config_before = seed.config.to_dict()
    upcycled = upcycle(seed, target)

    checked = set()
    for index, layer in enumerate(upcycled.model.layers):
        for name, group in layer.mlp.groups.items():
            prefix = f"model.layers.{index}.mlp.groups.{name}"
            source = group_of(seed.model.layers[index], name)
            gate, up, down = matrices(source.mlp)
            if upcycled.config.group_num_experts(name) == 1:
                for mine, theirs in zip(matrices(group.mlp), (gate, up, down)):
                    assert torch.equal(mine, theirs)
                checked |= {f"{prefix}.mlp.{matrix}_proj.weight" for matrix in ("gate", "up", "down")}
                continue
            assert group.experts.gate_up_proj.shape[0] == upcycled.config.group_num_experts(name)
            for expert in range(upcycled.config.group_num_experts(name)):
                for row in range(gate.shape[0]):
                    assert torch.equal(group.experts.gate_up_proj[expert, row], gate[row])
                    assert torch.equal(group.experts.gate_up_proj[expert, gate.shape[0] + row], up[row])
                assert torch.equal(group.experts.down_proj[expert], down)
            assert (group.router.threshold == 0.5).all() and (group.router.balance_bias == 0).all()
            assert group.router.num_updates == 0
            assert 0.2 < group.router.weight.std() < 0.4
            checked |= {
                key for key in upcycled.state_dict() if key.startswith((f"{prefix}.experts", f"{prefix}.router"))
            }
    for key, tensor in upcycled.state_dict().items():
        if key not in checked:
            assert torch.equal(tensor, before[key]), key
            assert tensor.data_ptr() != seed.state_dict()[key].data_ptr(), key
    untaken = {key for key in before if key not in upcycled.state_dict()}
    assert all(".groups." in key and ".shared_expert." not in key for key in untaken)

    assert seed.config.to_dict() == config_before
    assert all(torch.equal(tensor, before[key]) for key, tensor in seed.state_dict().items())
    assert upcycled.config.num_experts == target
    changed = {"dtype", "num_experts", "gumbel_noise", "gumbel_noise_steps"}
    for key, value in upcycled.config.to_dict().items():
        assert key in changed or value == config_before[key], key
    assert all(parameter.requires_grad or "auxiliary" in name for name, parameter in upcycled.named_parameters())
    if upcycled.config.tie_word_embeddings:
        assert upcycled.lm_head.weight is upcycled.model.embed_tokens.weight


def test_routers_of_layers_and_groups_are_drawn_anew():
    seed = tiny_model(**GROUPS["1t1i"])
    torch.manual_seed(1)
    first = upcycle(seed, FOUR_EACH)
    weights = [group.router.weight for _, _, group in groups_of(seed, first)]
    assert len({weight.sum().item() for weight in weights}) == len(weights)
    torch.manual_seed(2)
    second = upcycle(seed, FOUR_EACH)
    assert not torch.equal(second.model.layers[0].mlp.groups["text"].router.weight, weights[0])


@pytest.mark.parametrize("training", [True, False])
def test_dtype_mode_attention_and_generation_config_are_those_of_the_seed(training):
    seed = tiny_model(**GROUPS["1t1i"], **DEPTH).to(torch.bfloat16)
    seed = seed.train(training)
    seed.set_attn_implementation("eager")
    seed.generation_config.top_k = 7
    upcycled = upcycle(seed, FOUR_EACH)
    for name, tensor in upcycled.state_dict().items():
        assert tensor.dtype == (torch.float32 if "router." in name else torch.bfloat16), name
        assert tensor.device == seed.device
    assert all(module.training == training for module in upcycled.modules())
    assert upcycled.config._attn_implementation == "eager"
    assert upcycled.generation_config.top_k == 7
    assert upcycled.generation_config is not seed.generation_config
    assert torch.isfinite(upcycled(mixed_ids()).logits).all()


def test_fields_of_the_stage_reach_the_config():
    seed = tiny_model(**GROUPS["1t1i"])
    config = upcycle(seed, FOUR_EACH).config
    assert (config.gumbel_noise, config.gumbel_noise_steps, config.normalize_gates) == (1.0, None, False)
    config = upcycle(
        seed,
        FOUR_EACH,
        preserve_function=True,
        gumbel_noise=0.5,
        gumbel_noise_steps=20,
        expert_capacity_factor={"text": 2.0},
        auxiliary_routers=True,
    ).config
    assert (config.gumbel_noise, config.gumbel_noise_steps, config.normalize_gates) == (0.5, 20, True)
    assert config.expert_capacity_factor == {"text": 2.0} and config.auxiliary_routers
    assert seed.config.expert_capacity_factor == 1.0


@pytest.mark.parametrize("groups", ["4t4i", "8x"])
def test_a_seed_with_several_experts_is_refused(groups):
    with pytest.raises(ValueError, match="`model` has num_experts"):
        upcycle(tiny_model(**GROUPS[groups]), FOUR_EACH)


def test_fields_that_no_configuration_has_are_refused():
    seed = tiny_model(**GROUPS["1t1i"])
    with pytest.raises(ValueError, match=r"`fields` = .*a MomaConfig has no \['norm_placment'\]"):
        upcycle(seed, norm_placment="pre")
    # of every configuration of Transformers, and of depth layers that the seed does not have
    assert upcycled_config(seed.config, use_cache=False, depth_capacity=0.5).depth_capacity == 0.5


def test_bad_arguments_are_refused():
    seed = tiny_model(**GROUPS["1t1i"])
    with pytest.raises(ValueError, match="`num_experts` = 8"):
        upcycle(seed, 8)
    with pytest.raises(ValueError, match="`num_experts` = 8"):
        upcycled_config(seed.config, 8)
    for perturbation in (-0.1, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=f"`perturbation` = {perturbation}: a standard deviation is a finite number"
        ):
            upcycle(seed, FOUR_EACH, perturbation=perturbation)
    with pytest.raises(StrictDataclassClassValidationError, match="gumbel_noise"):
        upcycle(tiny_model(**GROUPS["1t1i"], training_routing="threshold"), FOUR_EACH, gumbel_noise=1.0)
    with pytest.raises(ValueError, match="`tie_word_embeddings` = True"):
        upcycle(seed, FOUR_EACH, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="`model` has no"):
        upcycle(seed.model, FOUR_EACH)
    for fields in ({"num_hidden_layers": 1}, {"qk_norm": "none"}):
        with pytest.raises(ValueError, match=f"`fields` = .'{next(iter(fields))}'.*of the seed would be lost, model"):
            upcycle(seed, FOUR_EACH, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"intermediate_size": 48},
        {"num_hidden_layers": 3},
        {"shared_expert_intermediate_size": 8},
        {"vocab_size": 48},
    ],
)
def test_fields_that_need_weights_which_the_seed_lacks_are_refused(fields):
    with pytest.raises(ValueError, match=f"`model` has no .*{next(iter(fields))}"):
        upcycle(tiny_model(**GROUPS["1t1i"]), FOUR_EACH, **fields)


@pytest.mark.parametrize(
    ("case", "routing"),
    [
        ("4t4i", "expert_choice"),
        ("dense to 8x", "threshold"),
        ("shared_by_modality", "token_choice"),
        ("uneven", "expert_choice"),
    ],
)
def test_preserved_function_gives_every_covered_token_what_the_seed_gave(case, routing):
    fields, target = CASES[case]
    seed = trained_seed(**fields, num_experts_per_tok=1).eval()
    upcycled = upcycle(seed, target, preserve_function=True)
    x_ND = tokens()
    for name, seed_group, group in groups_of(seed, upcycled):
        upcycled.config.num_experts_per_tok = 2
        # so high that some tokens get no expert of eight
        group.router.threshold.fill_(0.7)
        output, taken_N = run_group(upcycled, name, group, x_ND, routing)
        expected, _ = reference_group(seed_group, x_ND, routing)
        is_covered = taken_N > 0
        assert is_covered.all() if routing == "token_choice" else 0 < is_covered.sum() < len(x_ND)
        assert (taken_N > 1).any()
        assert_near(output[is_covered], expected[is_covered], 1e-6)
        nothing = torch.zeros_like(x_ND)
        if seed_group.shared_expert is not None:
            nothing = swiglu(x_ND, *matrices(seed_group.shared_expert))
        assert_near(output[~is_covered], nothing[~is_covered], 1e-6)


@pytest.mark.parametrize(
    "case", ["4t4i", "dense to 8x", "shared", "shared_by_modality", "depth", "pre", "gate_after_norm"]
)
def test_with_one_expert_for_every_token_the_whole_model_is_preserved(case):
    fields, target = CASES[case]
    seed = trained_seed(**fields).eval()
    upcycled = upcycle(seed, target, preserve_function=True)
    ids = mixed_ids(4, 16)
    with torch.no_grad():
        expected = seed(ids, routing="token_choice").logits
        torch.testing.assert_close(upcycled(ids, routing="token_choice").logits, expected, rtol=1e-5, atol=1e-5)
        plain = upcycle(seed, target)
        if upcycled.config.norm_placement == "pre":
            assert not torch.allclose(plain(ids, routing="token_choice").logits, expected, atol=1e-2)


@torch.no_grad()
def test_perturbed_copies_differ_by_about_the_asked_share():
    seed = tiny_model(**GROUPS["dense"])
    for layer in seed.model.layers:
        # a spread of its own for each matrix
        layer.mlp.groups["all"].mlp.up_proj.weight *= 5
    torch.manual_seed(3)
    upcycled = upcycle(seed, {"text": 4, "image": 1}, perturbation=0.1)
    for name, seed_group, group in groups_of(seed, upcycled):
        if name == "image":
            assert all(torch.equal(*pair) for pair in zip(matrices(group.mlp), matrices(seed_group.mlp)))
            continue
        copies = [(*group.experts.gate_up_proj[e].chunk(2), group.experts.down_proj[e]) for e in range(4)]
        for mine in copies:
            for matrix, source in zip(mine, matrices(seed_group.mlp)):
                assert (matrix - source).std() / source.std() == pytest.approx(0.1, rel=0.15)
        for first in range(4):
            for second in range(first):
                difference = copies[first][0] - copies[second][0]
                share = difference.std() / seed_group.mlp.gate_proj.weight.std()
                assert share == pytest.approx(0.1 * math.sqrt(2), rel=0.15)
    names = [name for name in upcycled.state_dict() if ".groups." not in name]
    assert all(torch.equal(upcycled.state_dict()[name], seed.state_dict()[name]) for name in names)


@pytest.mark.parametrize(("preserve_function", "gumbel_noise"), [(False, 1.0), (True, 0.0)])
def test_experts_part_ways_in_further_training(preserve_function, gumbel_noise):
    seed = trained_seed(**GROUPS["1t1i"])
    upcycled = upcycle(seed, FOUR_EACH, preserve_function=preserve_function, gumbel_noise=gumbel_noise)
    optimizer = torch.optim.AdamW(upcycled.parameters(), lr=3e-3)
    ids = mixed_ids(8, 16)
    losses = []
    for _ in range(8):
        loss = upcycled(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    for _, _, group in groups_of(seed, upcycled):
        assert group.router.num_updates == 8
        for first in range(4):
            for second in range(first):
                for packed in (group.experts.gate_up_proj, group.experts.down_proj):
                    assert (packed[first] - packed[second]).abs().max() > 1e-3


def test_config_can_be_had_without_weights():
    config = upcycled_config(tiny_config(**GROUPS["dense"]), 8, expert_capacity_factor=2.0)
    assert (config.num_experts, config.expert_capacity_factor) == (8, 2.0)


def test_new_groups_do_not_infer_with_routers_that_know_nothing():
    seed = tiny_model(**GROUPS["1t1i"], **DEPTH, auxiliary_routers=True, inference_routing="auxiliary")
    upcycled = upcycle(seed, FOUR_EACH)
    assert (upcycled.config.inference_routing, upcycled.config.depth_inference_routing) == ("threshold", "auxiliary")
    # without depth there is nothing to keep
    seed = tiny_model(**GROUPS["1t1i"], auxiliary_routers=True, inference_routing="auxiliary")
    assert upcycle(seed, FOUR_EACH).config.depth_inference_routing is None
