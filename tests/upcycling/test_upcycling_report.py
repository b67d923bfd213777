# SPDX-License-Identifier: Apache-2.0
import copy
import json
import math

import pytest
import torch

from helpers.reference import GROUPS, reference_group
from helpers.upcycling import CASES, DEPTH, FOUR_EACH, ONE_EACH, padded_batch, run_group, trained_seed
from modeling_moma import MomaForCausalLM, upcycle, upcycling_receipt
from modeling_moma.routing_moma import MomaRouter
from modeling_moma.token_groups_moma import token_modalities


@pytest.mark.parametrize("case", CASES)
def test_receipt_counts_what_was_taken_copied_and_new(case):
    fields, target = CASES[case]
    seed = trained_seed(**fields)
    upcycled = upcycle(seed, target)
    receipt = upcycling_receipt(seed, upcycled)
    counts = {"taken": 0, "copied": 0, "new": 0}
    for name in upcycled.state_dict():
        if name in seed.state_dict():
            counts["taken"] += 1
        elif ".router." in name:
            counts["new"] += 1
        else:
            counts["copied"] += 1
    assert receipt.tensors == counts
    assert all(counts.values())
    for model, name in ((seed, "seed"), (upcycled, "upcycled")):
        assert receipt.parameters[name] == sum(parameter.numel() for parameter in model.parameters())
    assert receipt.coverage == {} and receipt.ffn_difference == {}
    assert json.loads(json.dumps(receipt.to_dict()))["output_difference"] is None


def plain_coverage(upcycled, batch):
    """Shares by group as lists of one for each layer, counted token by token."""
    shares = {name: [] for name in upcycled.config.expert_groups}
    names = {
        module: path.split(".")[-2] for path, module in upcycled.named_modules() if isinstance(module, MomaRouter)
    }

    def count(router, args, output):
        taken = [0] * args[0].shape[0]
        for row in output[1].token_EK.tolist():
            for token in row:
                taken[token] += 1
        classes = [sum(min(number, 2) == wanted for number in taken) for wanted in range(3)]
        shares[names[router]].append(([number / len(taken) for number in classes], len(taken)))

    handles = [router.register_forward_hook(count) for router in names]
    with torch.no_grad():
        upcycled.eval()(**batch, routing="expert_choice")
    for handle in handles:
        handle.remove()
    return shares


@pytest.mark.parametrize("case", ["4t4i", "6t2i", "dense to 8x"])
def test_receipt_measures_coverage_of_the_tokens_that_are_no_padding(case):
    fields, target = CASES[case]
    seed = trained_seed(**fields)
    upcycled = upcycle(seed, target)
    batch = padded_batch()
    receipt = upcycling_receipt(seed, upcycled, batch)
    modality = token_modalities(seed.config, batch["input_ids"])
    for index, (name, layers) in enumerate(plain_coverage(upcycled, batch).items()):
        mine = (batch["attention_mask"] == 1) & ((modality == index) | (name == "all"))
        assert {number for _, number in layers} == {int(mine.sum())}
        expected = [sum(share[wanted] for share, _ in layers) / len(layers) for wanted in range(3)]
        assert receipt.coverage[name] == pytest.approx(expected, abs=1e-6)
        assert sum(receipt.coverage[name]) == pytest.approx(1, abs=1e-6)
    # what stands at padding changes nothing
    again = upcycling_receipt(seed, upcycled, padded_batch(filler=9))
    assert again.coverage == receipt.coverage
    assert again.output_difference == pytest.approx(receipt.output_difference, rel=1e-5)
    for name, differences in receipt.ffn_difference.items():
        assert again.ffn_difference[name] == pytest.approx(differences, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("preserve_function", [True, False])
def test_receipt_measures_the_change_of_groups_and_of_the_output(preserve_function):
    seed = trained_seed(**GROUPS["1t1i"], num_hidden_layers=1)
    upcycled = upcycle(seed, FOUR_EACH, preserve_function=preserve_function)
    batch = padded_batch()
    receipt = upcycling_receipt(seed, upcycled, batch)

    inputs = {}
    handles = [
        group.register_forward_hook(lambda group, args, output, name=name: inputs.update({name: (args[0], output[0])}))
        for name, group in upcycled.model.layers[0].mlp.groups.items()
    ]
    with torch.no_grad():
        actual = upcycled.eval()(**batch, routing="expert_choice").logits
        expected = seed.eval()(**batch).logits
    for handle in handles:
        handle.remove()
    real = [(b, t) for b, t in (batch["attention_mask"] == 1).nonzero().tolist()]
    change = math.sqrt(sum((actual[b, t] - expected[b, t]).square().sum().item() for b, t in real))
    size = math.sqrt(sum(expected[b, t].square().sum().item() for b, t in real))
    assert receipt.output_difference == pytest.approx(change / size, rel=1e-4)
    modality = token_modalities(seed.config, batch["input_ids"])
    assert list(receipt.output_differences) == ["text", "image"]
    for index, name in enumerate(("text", "image")):
        mine = [(b, t) for b, t in real if modality[b, t] == index]
        change = math.sqrt(sum((actual[b, t] - expected[b, t]).square().sum().item() for b, t in mine))
        size = math.sqrt(sum(expected[b, t].square().sum().item() for b, t in mine))
        assert receipt.output_differences[name] == pytest.approx(change / size, rel=1e-4)

    for name, (x_ND, output) in inputs.items():
        _, taken_N = run_group(upcycled, name, upcycled.model.layers[0].mlp.groups[name], x_ND, "expert_choice")
        reference, _ = reference_group(seed.model.layers[0].mlp.groups[name], x_ND, "expert_choice")
        for wanted in range(3):
            mine = [n for n in range(len(x_ND)) if min(taken_N[n], 2) == wanted]
            change = math.sqrt(sum((output[n] - reference[n]).square().sum().item() for n in mine))
            size = math.sqrt(sum(reference[n].square().sum().item() for n in mine))
            assert mine
            assert receipt.ffn_difference[name][wanted] == pytest.approx(change / size, rel=1e-4, abs=1e-6)
        uncovered, *covered = receipt.ffn_difference[name]
        assert uncovered == pytest.approx(1.0)
        if preserve_function:
            assert covered == pytest.approx([0, 0], abs=1e-6)
        else:
            # fresh routers score about one half
            assert 0.1 < covered[0] < 0.9


def test_receipt_of_depth_layers_compares_the_same_choice_of_tokens():
    # a model without routers of experts is the seed itself
    seed = trained_seed(**GROUPS["1t1i"], **DEPTH)
    same = upcycle(seed, ONE_EACH)
    receipt = upcycling_receipt(seed, same, padded_batch())
    assert receipt.output_difference == 0 and receipt.coverage == {}
    upcycled = upcycle(seed, FOUR_EACH, preserve_function=True)
    receipt = upcycling_receipt(seed, upcycled, padded_batch())
    assert receipt.ffn_difference["text"][1] == pytest.approx(0, abs=1e-6)


def test_receipt_of_a_batch_without_images_is_valid_json():
    seed = trained_seed(**GROUPS["1t1i"], **DEPTH)
    ids = torch.full((2, 8), 30) + torch.arange(8)
    receipt = upcycling_receipt(seed, upcycle(seed, FOUR_EACH), {"input_ids": ids})
    assert sum(receipt.coverage["text"]) == pytest.approx(1)
    text = json.dumps(receipt.to_dict(), allow_nan=False)
    assert json.loads(text)["coverage"]["image"] == [None] * 3
    assert json.loads(text)["output_differences"] == {"text": receipt.output_difference, "image": None}


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_receipt_leaves_modes_hooks_and_statistics_as_they_were(modes):
    seed = trained_seed(**GROUPS["1t1i"])
    upcycled = upcycle(seed, FOUR_EACH)
    seed.train(modes[0])
    upcycled.train(modes[1])
    before = copy.deepcopy(upcycled.state_dict())
    upcycling_receipt(seed, upcycled, padded_batch())
    with pytest.raises(IndexError):
        upcycling_receipt(seed, upcycled, {"input_ids": torch.full((1, 4), 99)})
    for model, mode in zip((seed, upcycled), modes):
        assert all(module.training == mode for module in model.modules())
        assert not any(isinstance(module, MomaForCausalLM) and module._forward_hooks for module in model.modules())
        groups = [group for layer in model.model.layers for group in layer.mlp.groups.values()]
        assert not any(group._forward_hooks for group in groups)
    assert all(torch.equal(tensor, before[name]) for name, tensor in upcycled.state_dict().items())


@pytest.mark.parametrize(("groups", "depth"), [("1t1i", {}), ("dense", DEPTH)])
def test_a_model_by_token_choice_is_measured_by_it(groups, depth):
    # a norm behind the layer takes the gates out by itself
    routings = {"training_routing": "token_choice", "inference_routing": "token_choice", "norm_placement": "pre"}
    if depth:
        routings |= {"depth_training_routing": "expert_choice", "depth_inference_routing": "threshold"}
    seed = trained_seed(**GROUPS[groups], **depth, **routings).eval()
    batch = padded_batch()
    is_token = batch["attention_mask"] == 1
    for preserve in (True, False):
        upcycled = upcycle(seed, FOUR_EACH, preserve_function=preserve).eval()
        receipt = upcycling_receipt(seed, upcycled, batch)
        assert receipt.routing == "token_choice"
        # every token has an expert
        assert all(shares[0] == 0 for shares in receipt.coverage.values())
        assert (receipt.output_difference < 1e-5) == preserve
        if not depth:
            with torch.no_grad():
                expected, actual = (model(**batch).logits[is_token] for model in (seed, upcycled))
            change = float((actual - expected).norm() / expected.norm())
            assert receipt.output_difference == pytest.approx(change, rel=1e-4, abs=1e-6)
