# SPDX-License-Identifier: Apache-2.0
"""Layers on several devices, as `device_map` lays them out, with devices that have shapes and no memory."""

import pytest
import torch
from accelerate import dispatch_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.parallel_reference import MODELS
from helpers.reference import GROUPS
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.documents_moma import Rows
from modeling_moma.routing_moma import MomaRouterBase, update_routers
from modeling_moma.token_groups_moma import FixedSplit, RouterStatistics, RoutingContext, split_modalities


COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class MixedOps(TorchDispatchMode):
    """Notes operations that meet tensors of several devices; numbers without a dimension may come from anywhere."""

    def __init__(self):
        super().__init__()
        self.found, self.on_meta = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = torch.utils._pytree.tree_leaves((args, kwargs))
        devices = {each.device.type for each in tensors if isinstance(each, torch.Tensor) and each.ndim}
        if len(devices) > 1 and operation not in COPIES:
            self.found.append(operation)
        self.on_meta += devices == {"meta"}
        return operation(*args, **(kwargs or {}))


def split_over_two(model):
    """The first half of the layers stays on the CPU, all that follows goes to `meta`."""
    half = model.config.num_hidden_layers // 2
    late = [f"model.layers.{index}" for index in range(half, model.config.num_hidden_layers)]
    early = [f"model.layers.{index}" for index in range(half)]
    device_map = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", *early], "cpu")
    device_map |= dict.fromkeys([*late, "model.norm", "lm_head"], "meta")
    skip_keys = model._skip_keys_device_placement
    return dispatch_model(model, device_map, main_device="cpu", force_hooks=True, skip_keys=skip_keys)


# routings under which no shape depends on a score
@pytest.mark.parametrize(
    ("groups", "training", "routing"),
    [
        ("4t4i", True, "expert_choice"),
        ("4t4i", False, "token_choice"),
        ("6t2i", True, "expert_choice"),
        ("shared_by_modality", False, "token_choice"),
        ("1t1i", False, "threshold"),
        ("dense", False, "threshold"),
    ],
)
def test_routing_follows_its_layer(groups, training, routing):
    model = split_over_two(tiny_model(num_hidden_layers=4, **GROUPS[groups])).train(training)
    # the one that `meta` computes in fp32
    model.set_experts_implementation("batched_mm")
    ids, mask = mixed_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    with MixedOps() as ops, torch.no_grad():
        output = model.model(ids, attention_mask=mask, routing=routing, use_cache=True)
    assert ops.found == [] and ops.on_meta > 0
    assert output.last_hidden_state.shape == (2, 12, model.config.hidden_size)
    assert output.last_hidden_state.device.type == "meta"
    devices = [layer.keys.device.type for layer in output.cache.layers]
    assert devices == ["cpu", "cpu", "meta", "meta"]


def test_a_context_moves_whole_and_in_place_and_parts_share_what_routers_leave():
    config = tiny_model().config
    modality_BT, padding_BT = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.bool)
    modality_BT[:, 3:] = 1
    padding_BT[1, 0] = True
    document_BT, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 1, 6, 6)
    split, _ = split_modalities(config, modality_BT, padding_BT)
    context = RoutingContext(
        "threshold", split, True, "expert_choice", modality_BT, Rows(padding_BT, document_BT, None, mask)
    )
    assert context.to("cpu") is context and context.to("meta", non_blocking=True) is context
    left = [
        name
        for values in (vars(context).items(), vars(context.split).items(), enumerate(context.rows))
        for name, value in values
        if isinstance(value, torch.Tensor) and value.device.type != "meta"
    ]
    assert left == []
    assert context.split.counts == split.counts
    part = context.for_tokens(context.split, context.modality_BT)
    assert part.step_of("router") is context.step_of("router")

    fixed = RoutingContext("threshold", FixedSplit(["text", "image"], modality_BT)).to("meta")
    assert fixed.has_fixed_shapes
    merged = fixed.split.merge(fixed.split.split(torch.empty(2, 6, 4, device="meta")), torch.empty(2, 6, 4))
    assert merged.shape == (2, 6, 4) and merged.device.type == "meta"


@pytest.mark.parametrize("name", MODELS)
def test_routers_are_updated_each_on_its_device(name):
    with FakeTensorMode():
        model = tiny_model(**MODELS[name])
        routers = [module for module in model.modules() if isinstance(module, MomaRouterBase)]
        for router in routers[len(routers) // 2 :]:
            for buffer in ("threshold", "balance_bias", "num_updates"):
                # a device that no machine needs for tensors without memory
                setattr(router, buffer, torch.empty_like(getattr(router, buffer), device="lazy"))
        context = RoutingContext("token_choice", split=None, track=True, depth_routing="token_choice")
        for router in routers:
            values = [torch.rand_like(router.threshold) for _ in range(4)]
            context.step_of(router).statistics = RouterStatistics(*values)
        # a fake tensor refuses an operation with another device
        update_routers(context, bias_update_rate=0.1)
        devices = {str(router.threshold.device) for router in routers}
    assert devices == {"cpu", "lazy"}
