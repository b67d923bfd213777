# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.planning.costs import flops_per_token
from modeling_moma.planning.layouts import Collective, Layout
from modeling_moma.planning.plans import GIGA, Hardware, candidate_layouts, plan_training


SMALL, LARGE = MomaConfig.from_preset("moma-90m-4t4i"), MomaConfig.from_preset("moma-1.4b-4t4i")
STEP = (24576, 4096)


def test_a_small_model_trains_as_copies_and_a_large_one_sharded():
    plans, misfits = plan_training(SMALL, 8, *STEP)
    assert plans[0].layout == Layout(8)
    assert misfits == []
    plans, misfits = plan_training(LARGE, 64, *STEP)
    assert plans[0].layout == Layout(8, 8)
    assert [str(layout) for layout, _ in misfits] == ["DDP 64"]
    # a larger shard group with EP cannot be loaded
    assert [str(plan.layout) for plan in plans if plan.layout.expert > 1] == [
        "HSDP 16 x 4 + EP 2",
        "HSDP 16 x 4 + EP 4",
    ]


def test_no_plan_exceeds_the_memory_and_the_fastest_is_first():
    hardware = Hardware(memory=40 * GIGA, headroom=0.8)
    plans, misfits = plan_training(LARGE, 16, *STEP, hardware)
    assert all(plan.memory.total <= 32 * GIGA for plan in plans)
    assert all(memory.total > 32 * GIGA for _, memory in misfits)
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds)
    layouts = [plan.layout for plan in plans] + [layout for layout, _ in misfits]
    assert len(set(layouts)) == len(layouts) == len(candidate_layouts(LARGE, 16, 8))


def test_layers_are_computed_again_where_memory_asks_for_it():
    roomy, _ = plan_training(LARGE, 8, *STEP)
    tight, _ = plan_training(LARGE, 8, *STEP, Hardware(memory=40 * GIGA))
    assert not roomy[0].checkpointing
    assert tight[0].sequences < roomy[0].sequences
    tightest, _ = plan_training(LARGE, 8, *STEP, Hardware(memory=31 * GIGA))
    assert tightest[0].checkpointing
    assert tightest[0].compute_seconds == pytest.approx(4 / 3 * roomy[0].compute_seconds)


def test_a_step_covers_all_tokens_whatever_the_layout():
    config = MomaConfig.from_preset("moma-mod-2.3b-4t4i")
    plans, _ = plan_training(config, 16, *STEP, Hardware(memory=200 * GIGA))
    assert any(plan.layout.tensor > 1 for plan in plans)
    flops = sum(flops_per_token(config, name, 4096, training=True) for name in ("text", "image")) / 2
    for plan in plans:
        data_ranks = plan.layout.gpus // plan.layout.tensor
        assert plan.sequences * plan.micro_batches * data_ranks * 4096 == 16 * 24576
        again = 4 / 3 if plan.checkpointing else 1
        assert plan.compute_seconds == pytest.approx(again * 24576 * flops / (0.4 * 989e12))
        assert plan.seconds == max(plan.compute_seconds, plan.weight_seconds) + plan.token_seconds


def test_only_sizes_that_divide_are_split():
    # 5461 = 43 * 127
    assert {layout.tensor for layout in candidate_layouts(LARGE, 8, 8)} == {1}
    assert {layout.expert for layout in candidate_layouts(LARGE, 8, 8)} == {1, 2, 4}
    dense = MomaConfig.from_preset("moma-1.4b-dense")
    assert {layout.expert for layout in candidate_layouts(dense, 8, 8)} == {1}
    uneven = MomaConfig.from_preset("moma-1.4b-4t4i", num_experts={"text": 6, "image": 2})
    assert {layout.expert for layout in candidate_layouts(uneven, 8, 8)} == {1, 2}


def test_rings_share_the_adapters_of_a_node_and_all_to_all_does_not():
    hardware = Hardware(bandwidth=100.0, network=10.0, latency=1e-9)

    def seconds(kind, ranks, stride):
        return hardware.seconds(Collective("", kind, 1600.0, ranks, stride, 1, True))

    assert seconds("all_gather", 8, 1) == pytest.approx(1600 * 7 / 8 / 100)
    # 8 adapters of 10 beat the node's own 100 not quite
    assert seconds("all_gather", 16, 1) == pytest.approx(1600 * 15 / 16 / 80)
    # one GPU of each node
    assert seconds("all_gather", 4, 8) == pytest.approx(1600 * 3 / 4 / 10)
    assert seconds("all_to_all", 16, 1) == pytest.approx(1600 * 8 / 16 / 10)
    assert seconds("all_to_all", 8, 1) == pytest.approx(1600 * 7 / 8 / 100)


def test_groups_that_lie_in_two_nodes_go_through_the_network():
    def seconds(kind, ranks, node_size):
        hardware = Hardware(bandwidth=100.0, network=10.0, latency=1e-9, node_size=node_size)
        return hardware.seconds(Collective("", kind, 1600.0, ranks, 1, 1, True))

    # of the third group one GPU is in the next node, alone
    assert seconds("all_to_all", 3, 8) == pytest.approx(1600 * 2 / 3 / 10)
    assert seconds("all_gather", 3, 8) == pytest.approx(1600 * 2 / 3 / 10)
    # of the second group there are two in either node
    assert seconds("all_gather", 4, 6) == pytest.approx(1600 * 3 / 4 / 20)
    assert seconds("all_gather", 3, 6) == pytest.approx(1600 * 2 / 3 / 100)


def test_gpus_that_do_not_fill_a_node_send_nothing_to_another():
    config = MomaConfig.from_preset("moma-1.4b-4t4i", num_experts={"text": 3, "image": 3})
    (partly, _), (whole, _) = (plan_training(config, 6, *STEP, Hardware(node_size=size)) for size in (8, 6))
    assert partly == whole and any(plan.layout.expert == 3 for plan in partly)
    # of two nodes with 8 GPUs the shard groups of 3 with EP lie in both
    (inside, _), (across, _) = (plan_training(config, 24, *STEP, Hardware(node_size=size)) for size in (24, 8))
    times = [{str(plan.layout): plan.token_seconds for plan in plans} for plans in (inside, across)]
    assert times[1]["HSDP 8 x 3 + EP 3"] > 5 * times[0]["HSDP 8 x 3 + EP 3"]


def test_many_small_exchanges_wait_for_one_another():
    hardware = Hardware(latency=1e-3)
    few, many = (hardware.seconds(Collective("", "all_gather", 1.0, 8, 1, calls, True)) for calls in (1, 100))
    assert few == pytest.approx(7e-3, rel=1e-3)
    assert many == pytest.approx(100 * few, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gpus": 0}, "`gpus`"),
        ({"gpus": 12}, "no whole number of nodes of 8"),
        ({"tokens_per_gpu": 5000}, "no multiple of `sequence_length`"),
        ({"sequence_length": 8192}, r"exceeds the model's positions \(4096\)"),
        ({"sequence_length": 64.0}, "`sequence_length`"),
    ],
)
def test_bad_arguments_are_named(change, match):
    arguments = {"gpus": 8, "tokens_per_gpu": 24576, "sequence_length": 4096, **change}
    with pytest.raises(ValueError, match=match):
        plan_training(SMALL, **arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"memory": 0}, "`memory`"), ({"network": math.inf}, "`network`"), ({"utilization": 1.5}, "`utilization`")],
)
def test_impossible_hardware_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        Hardware(**change)
