# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from helpers.tiny import tiny_model
from modeling_moma.evaluation.routing_images import record_routing


# of `tiny_config`: 8 to 23 are codes, 24 and 25 the frame of an image
IDS = torch.tensor([0, 24, 8, 9, 10, 11, 25, 30, 31, 32])


def model_of(**fields):
    return tiny_model(**{"num_hidden_layers": 3, "initializer_range": 0.5, "norm_placement": "post", **fields}).eval()


def test_recorded_experts_are_those_whose_threshold_the_score_reaches():
    model = model_of(num_experts={"text": 3, "image": 2})
    routed = record_routing(model, IDS)
    groups, experts = routed.groups, routed.experts
    assert groups == ["text"] * 2 + ["image"] * 4 + ["text"] * 4
    with torch.no_grad():
        logits = model(input_ids=IDS[None], output_router_logits=True).router_logits
    sizes = set()
    for layer in range(3):
        for index, group in enumerate(model.config.expert_groups):
            router = model.model.layers[layer].mlp.groups[group].router
            scores = logits[2 * layer + index].sigmoid()
            places = [place for place, name in enumerate(groups) if name == group]
            for place, row in zip(places, scores, strict=True):
                ranked = row.argsort(descending=True).tolist()
                taken = [expert for expert in ranked if row[expert] >= router.threshold[expert]]
                assert experts[layer][place] == taken
                sizes.add(len(taken))
    # the example holds uncovered tokens, and tokens of several experts
    assert {0, 1, 2} <= sizes


def test_a_group_of_one_expert_takes_all_its_tokens_and_a_shared_group_serves_both_modalities():
    routed = record_routing(model_of(num_experts={"text": 1, "image": 1}), IDS)
    assert routed.experts == [[[0]] * 10] * 3
    routed = record_routing(model_of(num_experts=4, inference_routing="token_choice"), IDS)
    assert routed.groups == ["all"] * 10
    assert all(len(chosen) == 1 for layer in routed.experts for chosen in layer)
    assert not any(map(any, routed.skipped))


def test_recording_leaves_no_hook_and_refuses_a_model_in_training():
    model = model_of()
    record_routing(model, IDS)
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("router"))
    with pytest.raises(ValueError, match="eval"):
        record_routing(model.train(), IDS)


@pytest.mark.parametrize("depth_routing", [None, "token_choice", "auxiliary"])
def test_a_depth_layer_names_whom_it_left_out_and_its_experts_take_the_others(depth_routing):
    fields = {"depth_inference_routing": depth_routing, "auxiliary_routers": depth_routing == "auxiliary"}
    model = model_of(num_experts={"text": 1, "image": 3}, depth_layers=[1], depth_capacity=0.5, **fields)
    with torch.no_grad():
        router = model.model.layers[1].depth_router
        router.threshold.fill_(0.5)
        if depth_routing == "auxiliary":
            # predictions on both sides of one half
            for layer in (router.auxiliary.up_proj, router.auxiliary.down_proj):
                layer.weight.normal_(generator=torch.Generator().manual_seed(0))
    chosen = []
    handle = model.model.layers[1].depth_router.register_forward_hook(
        lambda module, args, output: chosen.append(output[1].chosen_BT[0].tolist())
    )
    routed = record_routing(model, IDS)
    handle.remove()
    assert routed.skipped[1] == [not is_chosen for is_chosen in chosen[0]]
    assert 0 < sum(routed.skipped[1]) < len(IDS), "the example has to tell them apart"
    assert not any(routed.skipped[0]) and not any(routed.skipped[2])
    for group, experts, is_skipped in zip(routed.groups, routed.experts[1], routed.skipped[1], strict=True):
        if is_skipped:
            assert experts == []
        elif group == "text":
            assert experts == [0]
