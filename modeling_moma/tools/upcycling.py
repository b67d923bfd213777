# SPDX-License-Identifier: Apache-2.0
"""Upcycling: a model with one feed-forward network per modality, or one for all, grows experts (MoMa section 2.5)."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..configuration_moma import TEXT, MomaConfig
from ..experts_moma import MomaExpertGroup
from ..modeling_moma import MomaForCausalLM
from ..routing_moma import MomaRouter
from ..routing_rules_moma import RULES


_TARGET = re.compile(r"(?:\d+[a-z])+")
# the matrices that are packed into those of experts
_PACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def parse_experts(name: str, modalities: Sequence[str] = (TEXT, "image")) -> int | dict[str, int]:
    """Read a name of the paper: `"4t4i"` as `{"text": 4, "image": 4}`, `"8x"` as `8`.

    Args:
        name: numbers of experts, each with the first letter of its modality, or one number and `x` for experts that
            all modalities share.
        modalities: the model's.

    Raises:
        ValueError: the name has another form or does not name every modality once, or two modalities begin alike.
    """
    if re.fullmatch(r"\d+x", name):
        return int(name[:-1])
    letters = {modality[0]: modality for modality in modalities}
    if len(letters) < len(modalities):
        raise ValueError(f"`modalities` = {list(modalities)} begin alike: give the experts as a dict.")
    parts = re.findall(r"(\d+)([a-z])", name)
    if not _TARGET.fullmatch(name) or sorted(letter for _, letter in parts) != sorted(letters):
        wanted = "".join(f"4{letter}" for letter in letters)
        raise ValueError(f"`name` = {name!r}: expected experts of {list(modalities)} as in {wanted!r}, or '8x'.")
    return {letters[letter]: int(count) for count, letter in parts}


def upcycled_config(config: MomaConfig, num_experts: int | dict[str, int], **fields) -> MomaConfig:
    """The configuration of a seed with more experts.

    Auxiliary routers of new groups know nothing yet, so a seed that infers with `"auxiliary"` becomes a model that
    infers with `"threshold"`; its depth layers keep their routing.

    Args:
        config: the seed's.
        num_experts: see [`MomaConfig`].
        fields: further fields that change.

    Raises:
        ValueError: the seed has a group of several experts, or groups that the target would have to merge.
    """
    grown = {group: config.group_num_experts(group) for group in config.expert_groups}
    if max(grown.values()) > 1:
        raise ValueError(
            f"`model` has num_experts={config.num_experts}: a seed has one expert in every group, whose copies are to "
            "become the experts."
        )
    if isinstance(config.num_experts, dict) and not isinstance(num_experts, dict):
        raise ValueError(
            f"`num_experts` = {num_experts!r}: experts that all modalities share cannot be copies of a seed's "
            "network for each modality."
        )
    inference = {}
    if RULES[config.inference_routing].needs_auxiliary:
        inference = {"inference_routing": "threshold"}
        if config.depth_layers and config.depth_inference_routing is None:
            inference["depth_inference_routing"] = config.inference_routing
    return MomaConfig.from_dict({**config.to_dict(), **inference, "num_experts": num_experts, **fields})


@torch.no_grad()
def upcycle(
    model: MomaForCausalLM,
    num_experts: int | dict[str, int],
    preserve_function: bool = False,
    perturbation: float = 0.0,
    gumbel_noise: float = 1.0,
    gumbel_noise_steps: int | None = None,
    **fields,
) -> MomaForCausalLM:
    """Grow a seed (1t1i, or dense) into a model with groups of experts, each a copy of the seed's network.

    Everything else is copied too, depth routers with their thresholds included; the routers of the new groups are
    fresh. Training goes on with a fresh optimizer and schedule, on the data after those that the seed has seen.

    A fresh router scores about one half. In the paper's form a token's copies are weighed by their scores and a third
    of the tokens gets none, so the model's output changes at the switch: [`upcycling_receipt`] says by how much.

    Args:
        model: the seed; not changed.
        num_experts: the target, for example `{"text": 4, "image": 4}`.
        preserve_function: set `normalize_gates`, so that a token that at least one expert takes gets exactly what the
            seed gave it. With `norm_placement="post"` the norm does nearly that by itself.
        perturbation: standard deviation of noise on the copies, as a share of the standard deviation of the copied
            matrix. Networks that stay alone in their group get none.
        gumbel_noise: `config.gumbel_noise` of the result.
        gumbel_noise_steps: `config.gumbel_noise_steps` of the result.
        fields: further fields of the configuration that change; none that sizes depend on.

    Returns:
        In the seed's dtype, on its device and in its mode.

    Raises:
        ValueError: see [`upcycled_config`]; or the perturbation is negative, or the fields ask for weights that the
            seed does not have.
    """
    if perturbation < 0:
        raise ValueError(f"`perturbation` = {perturbation}: a standard deviation is not negative.")
    config = upcycled_config(
        model.config,
        num_experts,
        gumbel_noise=gumbel_noise,
        gumbel_noise_steps=gumbel_noise_steps,
        **({"normalize_gates": True} if preserve_function else {}),
        **fields,
    )
    attention = model.config._attn_implementation
    upcycled = MomaForCausalLM._from_config(config, dtype=model.dtype, attn_implementation=attention)
    upcycled.to(model.device)
    seed_state, state = model.state_dict(), upcycled.state_dict()
    for name, tensor in state.items():
        source = _copied_from(name, seed_state)
        if source is None and "router" in name:
            continue
        if isinstance(source, list):
            parts = [seed_state[part] for part in source]
            copied = torch.stack([torch.cat([_perturbed(part, perturbation) for part in parts]) for _ in tensor])
        else:
            copied = None if source is None else seed_state.get(source)
        if copied is None or copied.shape != tensor.shape:
            raise ValueError(
                f"`model` has no {name} of shape {list(tensor.shape)} to copy. Is it a MomaForCausalLM, and do "
                f"`fields` = {sorted(fields)} leave its sizes as they are?"
            )
        tensor.copy_(copied)
    upcycled.generation_config = deepcopy(model.generation_config)
    return upcycled.train(model.training)


def _copied_from(name: str, seed_state: Mapping[str, torch.Tensor]) -> str | list[str] | None:
    """Where a tensor comes from: a name, the names of the matrices that are packed into it, or None for a new one."""
    # a dense seed has one group that stands for each modality's
    for source in (name, re.sub(r"\.groups\.[^.]+\.", ".groups.all.", name)):
        if source in seed_state:
            return source
        prefix, _, packed = source.partition(".experts.")
        parts = [f"{prefix}.mlp.{matrix}.weight" for matrix in _PACKED.get(packed, ())]
        if parts and parts[0] in seed_state:
            return parts
    return None


def _perturbed(matrix: torch.Tensor, perturbation: float) -> torch.Tensor:
    if not perturbation:
        return matrix
    wide = matrix.float()
    return (wide + torch.randn_like(wide) * wide.std() * perturbation).to(matrix.dtype)


@dataclass
class UpcyclingReceipt:
    """What became of a seed.

    Attributes:
        tensors: numbers of tensors that were `"taken"` as they are, `"copied"` into experts, and that are `"new"`.
        parameters: of the `"seed"` and of the `"upcycled"` model.
        coverage: shares of a group's tokens that 0, 1, and 2 or more experts took under `expert_choice`, averaged over
            the layers; by group.
        output_difference: norm of the logits' change over the norm of the seed's logits.
        ffn_difference: the same for the output of a group, given the same input, of the tokens that 0, 1, and 2 or
            more experts took, averaged over the layers; by group. NaN where no token was.
    """

    tensors: dict[str, int]
    parameters: dict[str, int]
    coverage: dict[str, list[float]] = field(default_factory=dict)
    output_difference: float = float("nan")
    ffn_difference: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """For JSON, which has no NaN: `None` instead."""
        return _without_nan(asdict(self))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if value != value else value


@torch.no_grad()
def upcycling_receipt(
    seed: MomaForCausalLM, upcycled: MomaForCausalLM, batch: dict[str, torch.Tensor] | None = None
) -> UpcyclingReceipt:
    """Count what was copied, and measure on a probe batch how much the switch changes.

    Both models choose by rank, without noise.

    Args:
        seed: as given to [`upcycle`].
        upcycled: what it returned.
        batch: `input_ids` and `attention_mask` of the probe.
    """
    seed_state = seed.state_dict()
    sources = [_copied_from(name, seed_state) for name in upcycled.state_dict()]
    kinds = Counter(
        "new" if source is None else "taken" if source == name else "copied"
        for name, source in zip(upcycled.state_dict(), sources)
    )
    receipt = UpcyclingReceipt(
        {kind: kinds[kind] for kind in ("taken", "copied", "new")},
        {"seed": seed.num_parameters(), "upcycled": upcycled.num_parameters()},
    )
    if batch is None:
        return receipt
    modes = seed.training, upcycled.training
    seed.eval()
    upcycled.eval()
    records, handles = [], []
    try:
        for path, name, group in _routed_groups(upcycled):
            handles.append(group.register_forward_hook(_record_group(name, _seed_group(seed, path, name), records)))
        # by rank, as both train: the thresholds of fresh routers say nothing yet
        expected, actual = (
            model(**batch, use_cache=False, routing="expert_choice", output_router_logits=True).logits.float()
            for model in (seed, upcycled)
        )
    finally:
        for handle in handles:
            handle.remove()
        seed.train(modes[0])
        upcycled.train(modes[1])
    is_token = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) == 1
    receipt.output_difference = float((actual - expected)[is_token].norm() / expected[is_token].norm())
    for name in sorted({name for name, _, _ in records}):
        shares, differences = zip(*[(share, difference) for group, share, difference in records if group == name])
        receipt.coverage[name] = torch.stack(shares).nanmean(0).tolist()
        receipt.ffn_difference[name] = torch.stack(differences).nanmean(0).tolist()
    return receipt


def _routed_groups(model: MomaForCausalLM) -> Iterator[tuple[str, str, MomaExpertGroup]]:
    for path, module in model.named_modules():
        if isinstance(module, MomaExpertGroup) and isinstance(getattr(module, "router", None), MomaRouter):
            yield path, path.rsplit(".", 1)[-1], module


def _seed_group(seed: MomaForCausalLM, path: str, name: str) -> nn.Module:
    groups = dict(seed.get_submodule(path.rsplit(".", 1)[0]).named_children())
    return groups[name] if name in groups else groups["all"]


def _record_group(name: str, seed_group: nn.Module, records: list) -> Callable:
    def record(group: MomaExpertGroup, args: tuple, output: tuple[torch.Tensor, torch.Tensor]):
        x_ND, context = args
        _, selection = group.router(x_ND, context)
        taken_N = torch.bincount(selection.token_EK.flatten(), minlength=x_ND.shape[0]).clamp(max=2)
        expected_ND = seed_group(x_ND, context)[0].float()
        change_N = (output[0].float() - expected_ND).square().sum(-1)
        size_N = expected_ND.square().sum(-1)
        in_class_CN = taken_N == torch.arange(3, device=taken_N.device).unsqueeze(-1)
        difference_C = ((in_class_CN * change_N).sum(-1) / (in_class_CN * size_N).sum(-1)).sqrt()
        records.append((name, in_class_CN.float().mean(-1), difference_C))

    return record


__all__ = ["UpcyclingReceipt", "parse_experts", "upcycle", "upcycled_config", "upcycling_receipt"]
