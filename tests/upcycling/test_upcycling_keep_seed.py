# SPDX-License-Identifier: Apache-2.0
"""Upcycling that keeps the seed's network as a shared expert, beside fresh experts that add nothing yet."""

import copy
from itertools import cycle

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from helpers.reference import GROUPS
from helpers.tiny import mixed_ids, tiny_config, tiny_model
from helpers.upcycling import CASES, FOUR_EACH, ONE_EACH, groups_of, matrices, padded_batch, trained_seed
from modeling_moma import MomaForCausalLM, parse_experts, upcycle, upcycled_config, upcycling_receipt


# those without `gate_after_norm`
KEPT = {name: case for name, case in CASES.items() if name != "gate_after_norm"}
ROUTINGS = ("expert_choice", "threshold", "token_choice")
THREE = {"modality_token_ranges": {"image": [[8, 16]], "audio": [[16, 24]]}}


def seed_shared(seed, name):
    """Networks beside the seed's own of a group, of one layer after the other."""
    for layer in seed.model.layers:
        group = layer.mlp.groups[name if name in layer.mlp.groups else "all"]
        yield [each for each in (group.shared_expert, layer.mlp.shared_expert) if each is not None]


def shared_by_group(upcycled):
    """The shared expert of every group that grew, layer by layer."""
    for layer in upcycled.model.layers:
        for name, group in layer.mlp.groups.items():
            if upcycled.config.group_num_experts(name) > 1:
                yield name, group.shared_expert or layer.mlp.shared_expert


@pytest.mark.parametrize(("case", "routing"), zip(KEPT, cycle(ROUTINGS)))
def test_the_function_at_the_switch_is_the_seeds(case, routing):
    fields, target = KEPT[case]
    seed = trained_seed(**fields).eval()
    upcycled = upcycle(seed, target, keep_seed=True)
    batch = padded_batch()
    is_token = batch["attention_mask"] == 1
    with torch.no_grad():
        expected = seed(**batch, routing=routing).logits[is_token]
        actual = upcycled(**batch, routing=routing).logits[is_token]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
        if routing == "expert_choice":
            # which copies do not give
            copies = upcycle(seed, target)(**batch, routing=routing).logits[is_token]
            assert (copies - expected).abs().max() > 1e-2


@pytest.mark.parametrize("case", KEPT)
def test_shared_experts_hold_the_seeds_networks_and_routed_ones_are_fresh(case):
    fields, target = KEPT[case]
    seed = trained_seed(**fields)
    before = copy.deepcopy(seed.state_dict())
    upcycled = upcycle(seed, target, keep_seed=True)
    assert upcycled.config.num_experts == target
    shared = shared_by_group(upcycled)
    besides = {name: seed_shared(seed, name) for name in upcycled.model.layers[0].mlp.groups}
    for name, seed_group, group in groups_of(seed, upcycled):
        beside = next(besides[name])
        if upcycled.config.group_num_experts(name) == 1:
            assert all(torch.equal(*pair) for pair in zip(matrices(group.mlp), matrices(seed_group.mlp)))
            continue
        networks = [matrices(network) for network in (seed_group.mlp, *beside)]
        shared_name, shared_expert = next(shared)
        assert shared_name == name
        for index, (mine, dim) in enumerate(zip(matrices(shared_expert), (0, 0, 1))):
            assert torch.equal(mine, torch.cat([network[index] for network in networks], dim))
        assert (group.experts.down_proj == 0).all()
        # as a fresh model's
        assert group.experts.gate_up_proj.std().item() == pytest.approx(seed.config.initializer_range, rel=0.1)
        assert len({expert.sum().item() for expert in group.experts.gate_up_proj}) == group.num_experts
        assert 0.2 < group.router.weight.std() < 0.4
    for name, tensor in upcycled.state_dict().items():
        if ".groups." not in name and ".mlp.shared_expert." not in name:
            assert torch.equal(tensor, before[name]), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in seed.state_dict().items())


def test_shared_experts_have_the_widths_of_what_they_hold():
    uneven = tiny_config(**GROUPS["1t1i"], expert_intermediate_size={"image": 48})
    config = upcycled_config(uneven, {"text": 1, "image": 4}, keep_seed=True)
    assert config.shared_expert_intermediate_size == {"image": 48}
    assert config.expert_intermediate_size == {"image": 48}
    config = upcycled_config(tiny_config(**GROUPS["dense"]), 8, keep_seed=True)
    assert (config.shared_expert_intermediate_size, config.intermediate_size) == (32, 32)
    # a shared expert of all modalities goes to each of them
    common = tiny_config(**GROUPS["1t1i"], shared_expert_intermediate_size=24)
    config = upcycled_config(common, {"text": 1, "image": 4}, keep_seed=True)
    assert config.shared_expert_intermediate_size == {"text": 24, "image": 56}
    # where nothing grows nothing changes
    assert upcycled_config(common, ONE_EACH, keep_seed=True).to_dict() == common.to_dict()


@pytest.mark.parametrize(
    "fields, target, size, expected",
    [
        (GROUPS["1t1i"], FOUR_EACH, 8, {"text": 8, "image": 8}),
        (GROUPS["1t1i"], FOUR_EACH, {"image": 8}, {"text": 32, "image": 8}),
        (GROUPS["1t1i"], {"text": 1, "image": 4}, 8, {"image": 8}),
        (GROUPS["dense"], FOUR_EACH, 8, {"text": 8, "image": 8}),
        (GROUPS["dense"], 8, 8, {"all": 8}),
    ],
)
def test_routed_experts_can_be_narrower_than_the_seed(fields, target, size, expected):
    seed = trained_seed(**fields).eval()
    upcycled = upcycle(seed, target, keep_seed=True, expert_intermediate_size=size)
    for layer in upcycled.model.layers:
        widths = {
            name: group.experts.down_proj.shape[-1]
            for name, group in layer.mlp.groups.items()
            if group.num_experts > 1
        }
        assert widths == expected
    ids = mixed_ids(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(upcycled(ids).logits, seed(ids).logits, rtol=1e-5, atol=2e-6)


def test_arguments_that_make_no_sense_together_are_refused():
    seed = tiny_model(**GROUPS["1t1i"])
    for arguments, message in (
        ({"perturbation": 0.1}, "`perturbation` = 0.1 does not go with `keep_seed`"),
        ({"preserve_function": True}, "`preserve_function` does not go with `keep_seed`"),
        ({"shared_expert_intermediate_size": 8}, r"`keep_seed` decides on \['shared_expert_intermediate_size'\]"),
        ({"intermediate_size": 8}, r"`keep_seed` decides on \['intermediate_size'\]"),
        ({"gate_after_norm": True}, "`keep_seed` does not go with `gate_after_norm`"),
        ({"expert_intermediate_size": {"audio": 8}}, "`expert_intermediate_size` = {'audio': 8}"),
    ):
        with pytest.raises(ValueError, match=message):
            upcycle(seed, FOUR_EACH, keep_seed=True, **arguments)
    for size in (8, {"text": 8}):
        with pytest.raises(ValueError, match="`expert_intermediate_size` = .* needs `keep_seed`"):
            upcycle(seed, FOUR_EACH, expert_intermediate_size=size)
    with pytest.raises(ValueError, match=r"the groups \['image'\] grow"):
        upcycle(seed, {"text": 1, "image": 4}, keep_seed=True, expert_intermediate_size={"text": 8})
    with pytest.raises(ValueError, match=r"the groups \[\] grow"):
        upcycle(seed, ONE_EACH, keep_seed=True, expert_intermediate_size=8)
    with pytest.raises(StrictDataclassClassValidationError, match="`expert_intermediate_size` = .* must be positive"):
        upcycle(seed, FOUR_EACH, keep_seed=True, expert_intermediate_size=0)


def test_gates_can_be_normalised_and_turned_off_after_the_norm():
    seed = trained_seed(**GROUPS["1t1i"], gate_after_norm=True).eval()
    ids = mixed_ids(4, 16)
    upcycled = upcycle(seed, FOUR_EACH, keep_seed=True, normalize_gates=True, gate_after_norm=False)
    assert upcycled.config.normalize_gates
    with torch.no_grad():
        torch.testing.assert_close(upcycled(ids).logits, seed(ids).logits, rtol=1e-5, atol=2e-6)


def test_gates_of_a_shared_expert_stay_as_they_are():
    seed = tiny_model(**GROUPS["1t1i"], gate_after_norm=True, shared_expert_intermediate_size=8)
    with pytest.raises(ValueError, match="`gate_after_norm` = False: the seed has True and shared experts"):
        upcycle(seed, FOUR_EACH, keep_seed=True, gate_after_norm=False)


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_two_steps_of_training_move_every_expert_and_router(norm_placement):
    seed = trained_seed(**GROUPS["1t1i"], norm_placement=norm_placement)
    upcycled = upcycle(seed, FOUR_EACH, keep_seed=True, gumbel_noise=0.0)
    # without decay: what has no gradient stays
    optimizer = torch.optim.SGD(upcycled.parameters(), lr=0.5)
    ids = mixed_ids(8, 16)
    groups = [group for layer in upcycled.model.layers for group in layer.mlp.groups.values()]

    def moved(before):
        return [name for name, tensor in upcycled.named_parameters() if not torch.equal(tensor, before[name])]

    start = {name: tensor.clone() for name, tensor in upcycled.named_parameters()}
    for step in range(2):
        optimizer.zero_grad()
        upcycled(ids, labels=ids).loss.backward()
        if step == 0:
            for group in groups:
                assert (group.experts.gate_up_proj.grad == 0).all() and (group.router.weight.grad == 0).all()
                assert (group.experts.down_proj.grad.flatten(1).norm(dim=-1) > 0).all()
        else:
            for group in groups:
                for parameter in (group.experts.gate_up_proj, group.experts.down_proj, group.router.weight):
                    assert (parameter.grad.flatten(1).norm(dim=-1) > 0).all()
        optimizer.step()
    assert sorted(moved(start)) == sorted(start)


def test_seed_in_bf16_is_kept_bit_by_bit(tmp_path):
    trained_seed(**GROUPS["1t1i"]).save_pretrained(tmp_path)
    seed = MomaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    upcycled = upcycle(seed, FOUR_EACH, keep_seed=True)
    assert upcycled.dtype == torch.bfloat16 and not upcycled.training
    ids = mixed_ids(4, 16)
    with torch.no_grad():
        assert torch.equal(upcycled(ids).logits, seed(ids).logits)


@pytest.mark.parametrize("fields", [GROUPS["dense"], {"num_experts": {"text": 1, "image": 1, "audio": 1}}])
def test_without_a_target_text_keeps_its_network_and_the_others_grow(fields):
    seed = trained_seed(**fields, **THREE).eval()
    for keep_seed in (False, True):
        upcycled = upcycle(seed, keep_seed=keep_seed)
        assert upcycled.config.num_experts == {"text": 1, "image": 4, "audio": 4}
        words = torch.arange(26, 40).view(2, 7)
        with torch.no_grad():
            torch.testing.assert_close(upcycled(words).logits, seed(words).logits, rtol=1e-6, atol=1e-6)
    text_alone = {"modality_token_ranges": {}, "begin_image_token_id": None, "end_image_token_id": None}
    with pytest.raises(ValueError, match=r"`num_experts` = None: .* \['text'\] alone"):
        upcycled_config(tiny_config(**GROUPS["dense"], **text_alone))
    # the target that the message names fits either kind of seed
    for groups in ({"num_experts": 1}, {"num_experts": {"text": 1}}):
        seed = tiny_config(**groups, **text_alone)
        assert upcycled_config(seed, parse_experts("4t", seed.modalities)).num_experts == {"text": 4}


@pytest.mark.parametrize("case", KEPT)
def test_receipt_counts_shared_experts_as_copied_and_fresh_ones_as_new(case):
    fields, target = KEPT[case]
    seed = trained_seed(**fields)
    upcycled = upcycle(seed, target, keep_seed=True)
    counts = {"taken": 0, "copied": 0, "new": 0}
    for name, tensor in upcycled.state_dict().items():
        known = seed.state_dict().get(name)
        if known is not None and torch.equal(tensor, known):
            counts["taken"] += 1
        elif ".experts." in name or ".router." in name:
            counts["new"] += 1
        else:
            assert ".shared_expert." in name or ".mlp.groups." in name
            counts["copied"] += 1
    assert all(counts.values())
    receipt = upcycling_receipt(seed, upcycled, padded_batch())
    assert receipt.tensors == counts
    assert receipt.output_difference == pytest.approx(0, abs=1e-5)
    assert receipt.output_differences == pytest.approx({"text": 0, "image": 0}, abs=1e-5)
    for name, differences in receipt.ffn_difference.items():
        assert differences == pytest.approx([0, 0, 0], abs=1e-5, nan_ok=True), name
