# SPDX-License-Identifier: Apache-2.0
"""What upcycling made of a source checkpoint: tensors taken, copied and made, and the change of the output."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch

from ..configuration_moma import RULES
from ..modeling_moma import MomaExpertGroup, MomaFeedForward, MomaForCausalLM
from ..routing_moma import MomaRouter
from ..token_groups_moma import token_modalities
from ..utils.records import only_finite
from .tensor_sources import kept_groups, tensor_sources


@dataclass
class UpcyclingReceipt:
    """What upcycling made of a source checkpoint.

    Attributes:
        tensors (`dict[str, int]`):
            numbers of tensors that were `"taken"` as they are, `"copied"` into experts, shared ones included, and that
            are `"new"`.
        parameters (`dict[str, int]`):
            of the `"seed"` and of the `"upcycled"` model.
        coverage (`dict[str, list[float]]`):
            shares of a group's tokens that 0, 1, and 2 or more experts took under `routing`, averaged over the layers;
            by group.
        output_difference (`float`):
            norm of the logits' change over the norm of the source's logits.
        ffn_difference (`dict[str, list[float]]`):
            the same for what a feed-forward layer gives a group's tokens, shared experts included, given the same
            input, of the tokens that 0, 1, and 2 or more experts took, averaged over the layers; by group. NaN where
            no token was.
        output_differences (`dict[str, float]`):
            `output_difference` by modality of the token at the position. NaN where no token was.
        routing (`str`):
            the rule of the experts on the probe: `token_choice` where the model trains by it, else `expert_choice`, as
            the thresholds of fresh routers carry no information yet.
    """

    tensors: dict[str, int]
    parameters: dict[str, int]
    coverage: dict[str, list[float]] = field(default_factory=dict)
    output_difference: float = float("nan")
    ffn_difference: dict[str, list[float]] = field(default_factory=dict)
    output_differences: dict[str, float] = field(default_factory=dict)
    routing: str = "expert_choice"

    def to_dict(self) -> dict:
        """Return the fields for JSON, which has neither NaN nor infinity: `None` instead."""
        return only_finite(asdict(self))


@torch.no_grad()
def upcycling_receipt(
    seed: MomaForCausalLM, upcycled: MomaForCausalLM, batch: dict[str, torch.Tensor] | None = None
) -> UpcyclingReceipt:
    """Count what was copied, and measure on a probe batch how much the switch changes.

    Both models route by the `routing` of the receipt, without noise; depth layers choose by rank.

    Args:
        seed (`MomaForCausalLM`):
            as given to [`upcycle`].
        upcycled (`MomaForCausalLM`):
            what it returned.
        batch (`dict[str, torch.Tensor]`, *optional*):
            `input_ids` and `attention_mask` of the probe.
    """
    training_routing = upcycled.config.training_routing
    report = UpcyclingReceipt(
        _count_tensors(seed, upcycled),
        {"seed": seed.num_parameters(), "upcycled": upcycled.num_parameters()},
        routing="expert_choice" if RULES[training_routing].reads_threshold else training_routing,
    )
    # depth layers train by expert choice alone, and learn their thresholds from it
    options = {"routing": report.routing, "output_router_logits": True, "use_cache": False}
    if upcycled.config.depth_layers:
        options["depth_routing"] = "expert_choice"
    if batch is None:
        return report
    modes = seed.training, upcycled.training
    seed.eval()
    upcycled.eval()
    records, handles = [], []
    try:
        for name, group, layer, seed_layer in _routed_groups(upcycled, seed):
            handles.append(group.register_forward_hook(_record_group(name, layer, seed_layer, records)))
        expected, actual = (model(**batch, **options).logits.float() for model in (seed, upcycled))
    finally:
        for handle in handles:
            handle.remove()
        seed.train(modes[0])
        upcycled.train(modes[1])
    is_token_BT = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) == 1
    report.output_difference = _difference(actual[is_token_BT], expected[is_token_BT])
    modality_BT = token_modalities(seed.config, batch["input_ids"])
    for index, modality in enumerate(seed.config.modalities):
        is_mine_BT = is_token_BT & (modality_BT == index)
        report.output_differences[modality] = _difference(actual[is_mine_BT], expected[is_mine_BT])
    for name in sorted({name for name, _, _ in records}):
        shares, differences = zip(*[(share, difference) for group, share, difference in records if group == name])
        report.coverage[name] = torch.stack(shares).nanmean(0).tolist()
        report.ffn_difference[name] = torch.stack(differences).nanmean(0).tolist()
    return report


def _count_tensors(seed: MomaForCausalLM, upcycled: MomaForCausalLM) -> dict[str, int]:
    sources = tensor_sources(upcycled.state_dict(), seed.state_dict(), kept_groups(seed.config, upcycled.config))
    kinds = Counter(
        "new" if not parts else "taken" if parts == [name] else "copied" for name, parts in sources.items()
    )
    return {kind: kinds[kind] for kind in ("taken", "copied", "new")}


def _difference(actual_NV: torch.Tensor, expected_NV: torch.Tensor) -> float:
    """Return the norm of the change over the norm of what was expected; NaN without a token."""
    return float((actual_NV - expected_NV).norm() / expected_NV.norm())


def _routed_groups(
    upcycled: MomaForCausalLM, seed: MomaForCausalLM
) -> Iterator[tuple[str, MomaExpertGroup, MomaFeedForward, MomaFeedForward]]:
    """Yield every group with a router: its name, itself, its layer and the source's layer."""
    for path, layer in upcycled.named_modules():
        if isinstance(layer, MomaFeedForward):
            seed_layer = seed.get_submodule(path)
            for name, group in layer.groups.items():
                if isinstance(getattr(group, "router", None), MomaRouter):
                    yield name, group, layer, seed_layer  # pyright: ignore[reportReturnType]


def _record_group(name: str, layer: MomaFeedForward, seed_layer: MomaFeedForward, records: list) -> Callable:
    seed_group = seed_layer.groups[name if name in seed_layer.groups else "all"]

    def record(group: MomaExpertGroup, args: tuple, output: tuple[torch.Tensor, torch.Tensor]):
        x_ND, context = args
        _, selection = group.router(x_ND, context)
        # pairs of weight 0 only pad a fixed layout
        token_P = selection.token_P[selection.weight_P > 0]
        taken_N = torch.bincount(token_P, minlength=x_ND.shape[0]).clamp(max=2)
        expected_ND = _with_common(seed_layer, x_ND, seed_group(x_ND, context)[0])
        change_N = (_with_common(layer, x_ND, output[0]) - expected_ND).square().sum(-1)
        size_N = expected_ND.square().sum(-1)
        in_class_CN = taken_N == torch.arange(3, device=taken_N.device).unsqueeze(-1)
        difference_C = ((in_class_CN * change_N).sum(-1) / (in_class_CN * size_N).sum(-1)).sqrt()
        records.append((name, in_class_CN.float().mean(-1), difference_C))

    return record


def _with_common(layer: MomaFeedForward, x_ND: torch.Tensor, y_ND: torch.Tensor) -> torch.Tensor:
    """Return a group's outputs in fp32 and those of the expert that all groups share."""
    return y_ND.float() if layer.shared_expert is None else y_ND.float() + layer.shared_expert(x_ND).float()
