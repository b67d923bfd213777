# SPDX-License-Identifier: Apache-2.0
"""Upcycling: a model with one feed-forward network per modality, or one for all, grows experts (MoMa section 2.5)."""

import re
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy

import torch
from transformers import AutoModelForCausalLM

from ..configuration_moma import RULES, MomaConfig, rule_names
from ..errors_moma import InputError
from ..frames_moma import TEXT
from ..modeling_moma import MomaForCausalLM
from .tensor_sources import kept_groups, shared_size, tensor_sources


_TARGET = re.compile(r"(?:\d+[a-z])+")
# widths that depend on `keep_seed`
_KEPT_SIZES = ("intermediate_size", "shared_expert_intermediate_size")


def parse_experts(name: str, modalities: Sequence[str] = (TEXT, "image")) -> int | dict[str, int]:
    """Read a name of the paper: `"4t4i"` as `{"text": 4, "image": 4}`, `"8x"` as `8`.

    Args:
        name (`str`):
            numbers of experts, each with the first letter of its modality, or one number and `x` for experts that all
            modalities share.
        modalities (`Sequence[str]`, *optional*, defaults to `(TEXT, "image")`):
            the model's.

    Raises:
        ValueError: the name has another form or does not name every modality once, or two modalities begin alike.
    """
    if re.fullmatch(r"\d+x", name):
        return int(name[:-1])
    letters = {modality[0]: modality for modality in modalities}
    if len(letters) < len(modalities):
        raise InputError(f"`modalities` = {list(modalities)} begin alike: give the experts as a dict.")
    parts = re.findall(r"(\d+)([a-z])", name)
    if not _TARGET.fullmatch(name) or sorted(letter for _, letter in parts) != sorted(letters):
        wanted = "".join(f"4{letter}" for letter in letters)
        raise InputError(f"`name` = {name!r}: expected experts of {list(modalities)} as in {wanted!r}, or '8x'.")
    return {letters[letter]: int(count) for count, letter in parts}


def default_experts(modalities: Sequence[str]) -> dict[str, int]:
    """Return the target in which text keeps its one network and every other modality gets four experts."""
    if list(modalities) == [TEXT]:
        raise InputError(
            f"`num_experts` = None: by default all modalities but text grow, and the model has {list(modalities)} "
            "alone. Name a target, as '4t'."
        )
    return {modality: 1 if modality == TEXT else 4 for modality in modalities}


def upcycled_config(
    config: MomaConfig,
    num_experts: int | dict[str, int] | None = None,
    keep_seed: bool = False,
    expert_intermediate_size: int | dict[str, int] | None = None,
    **fields,
) -> MomaConfig:
    """Return the configuration of a source checkpoint with more experts.

    Auxiliary routers of new groups know nothing yet, so a source checkpoint that infers with `"auxiliary"` becomes a
    model that infers with `"threshold"`; its depth layers keep their routing.

    Args:
        config (`MomaConfig`):
            the source's.
        num_experts (`int | dict[str, int]`, *optional*):
            see [`MomaConfig`]; by default 1 for text and 4 for every other modality.
        keep_seed (`bool`, *optional*, defaults to `False`):
            the shared expert of a group that grows is as wide as the source's network, and as its shared experts where
            it has some, taken together.
        expert_intermediate_size (`int | dict[str, int]`, *optional*):
            with `keep_seed`, inner width of one routed expert in every group that grows, or by group; by default the
            seed's.
        fields (`Any`):
            further fields that change.

    Raises:
        ValueError: the source has a group of several experts, or groups that the target would have to merge; a width
            is given without `keep_seed`, or for a group that does not grow; a field that no configuration has is to
            change; the embedding and the head of a source
            that has both are to be tied; or `keep_seed` meets a field that it decides on, or `gate_after_norm`, with
            which a fresh router scales what the shared expert gives.
    """
    grown = {group: config.group_num_experts(group) for group in config.expert_groups}
    if max(grown.values()) > 1:
        raise InputError(
            f"`model` has num_experts={config.num_experts}: a seed has one expert in every group, whose copies are to "
            "become the experts."
        )
    if num_experts is None:
        num_experts = default_experts(config.modalities)
    if isinstance(config.num_experts, dict) and not isinstance(num_experts, dict):
        raise InputError(
            f"`num_experts` = {num_experts!r}: experts that all modalities share cannot be copies of a seed's "
            "network for each modality."
        )
    if expert_intermediate_size is not None and not keep_seed:
        raise InputError(
            f"`expert_intermediate_size` = {expert_intermediate_size!r} needs `keep_seed`: without it experts are "
            "copies of the seed's network and have its width."
        )
    # PreTrainedConfig accepts unknown names and stores them unused
    unknown = sorted(set(fields) - set(config.to_dict()))
    if unknown:
        raise InputError(f"`fields` = {sorted(fields)}: a MomaConfig has no {unknown}. Is a name misspelt?")
    decided = sorted(set(fields) & set(_KEPT_SIZES))
    if keep_seed and decided:
        raise InputError(
            f"`fields` = {sorted(fields)}: `keep_seed` decides on {decided}; `expert_intermediate_size` gives the "
            "width of the routed experts."
        )
    if fields.get("tie_word_embeddings") and not config.tie_word_embeddings:
        raise InputError(
            "`tie_word_embeddings` = True: the seed has an embedding and a head of its own; one would be lost."
        )
    inference = {}
    if RULES[config.inference_routing].needs_auxiliary:
        inference = {"inference_routing": "threshold"}
        if config.depth_layers and config.depth_inference_routing is None:
            inference["depth_inference_routing"] = config.inference_routing
    upcycled = MomaConfig.from_dict({**config.to_dict(), **inference, "num_experts": num_experts, **fields})
    if keep_seed:
        sizes = _sizes_beside_seed(config, upcycled, expert_intermediate_size)
        upcycled = MomaConfig.from_dict({**upcycled.to_dict(), **sizes})
    return upcycled


def _sizes_beside_seed(seed: MomaConfig, upcycled: MomaConfig, expert_size: int | dict[str, int] | None) -> dict:
    """Return the fields of the widths with which shared experts hold the source's networks."""
    grown = [group for group in upcycled.expert_groups if upcycled.group_num_experts(group) > 1]
    if grown and upcycled.gate_after_norm:
        raise InputError(
            "`keep_seed` does not go with `gate_after_norm`: the gates of fresh routers would scale what the seed's "
            "network gives. In a seed without shared experts the field changes nothing: give gate_after_norm=False."
        )
    # groups with a shared expert are scaled by their gates in one of two ways, which has to be the same in both models
    has_shared = any(shared_size(seed, group) for group in seed.expert_groups)
    if has_shared and seed.gate_after_norm != upcycled.gate_after_norm:
        raise InputError(
            f"`gate_after_norm` = {upcycled.gate_after_norm}: the seed has {seed.gate_after_norm} and shared experts, "
            "and would not give what it gives. `keep_seed` keeps the field, too."
        )
    if isinstance(expert_size, int):
        widths = dict.fromkeys(grown, expert_size)
    else:
        widths = expert_size or {}
    if not set(widths) <= set(grown) or (expert_size is not None and not grown):
        raise InputError(
            f"`expert_intermediate_size` = {expert_size!r}: with num_experts={upcycled.num_experts} the groups "
            f"{grown} grow, all others keep the seed's network and its width."
        )
    if not grown:
        return {}
    shared = {
        group: shared_size(seed, group) + (seed.group_intermediate_size(group) if group in grown else 0)
        for group in upcycled.expert_groups
    }
    if "all" in shared:
        width = widths.get("all", upcycled.intermediate_size)
        return {"shared_expert_intermediate_size": shared["all"], "intermediate_size": width}
    return {
        "shared_expert_intermediate_size": {group: width for group, width in shared.items() if width},
        "expert_intermediate_size": {**(upcycled.expert_intermediate_size or {}), **widths} or None,
    }


@torch.no_grad()
def upcycle(
    model: MomaForCausalLM,
    num_experts: int | dict[str, int] | None = None,
    preserve_function: bool = False,
    perturbation: float = 0.0,
    gumbel_noise: float | None = None,
    gumbel_noise_steps: int | None = None,
    keep_seed: bool = False,
    expert_intermediate_size: int | dict[str, int] | None = None,
    **fields,
) -> MomaForCausalLM:
    """Grow a source checkpoint (1t1i, or dense) into a model whose experts are copies of the source's networks.

    Everything else is copied too, depth routers with their thresholds included; the routers of the new groups are
    fresh. Training goes on with a fresh optimizer and schedule, on the data after those that the source has seen.

    A fresh router scores about one half. In the paper's form (MoMa section 2.5) a token's copies are weighed by their
    scores and a third of the tokens gets none, so the model's output changes at the switch: [`upcycling_receipt`] says
    by how much. With `keep_seed` it does not change: the source's network becomes the group's shared expert, which
    every token passes, and the routed experts are fresh and begin with adding nothing. The first step of training
    moves their `down_proj` alone, all else of them and their routers move from the second on.

    Args:
        model (`MomaForCausalLM`):
            the source; not changed.
        num_experts (`int | dict[str, int]`, *optional*):
            the target, for example `{"text": 4, "image": 4}`; by default 1 for text, which thus stays as it is, and 4
            for every other modality.
        preserve_function (`bool`, *optional*, defaults to `False`):
            set `normalize_gates`, so that a token that at least one expert takes gets exactly what the source gave it.
            With `norm_placement="post"` the norm does nearly that by itself.
        perturbation (`float`, *optional*, defaults to `0.0`):
            standard deviation of noise on the copies, as a share of the standard deviation of the copied matrix.
            Networks that stay alone in their group get none.
        gumbel_noise (`float`, *optional*):
            `config.gumbel_noise` of the result; by default 1.0, the paper's, and 0.0 where its `training_routing`
            takes no noise.
        gumbel_noise_steps (`int`, *optional*):
            `config.gumbel_noise_steps` of the result.
        keep_seed (`bool`, *optional*, defaults to `False`):
            make the source's network the shared expert of every group that grows, in place of copies. A shared expert
            that the source has already becomes one with it, by modality where the target's experts are.
        expert_intermediate_size (`int | dict[str, int]`, *optional*):
            with `keep_seed`, inner width of one routed expert, for all groups that grow or by group; by default the
            seed's.
        fields (`Any`):
            further fields of the configuration that change; none that sizes depend on.

    Returns:
        `MomaForCausalLM`: in the source's dtype, on its device and in its mode.

    Raises:
        ValueError: see [`upcycled_config`]; or the model is quantised, the perturbation is negative or not finite, the
            fields ask for weights that the source does not have or leave some of its out, or `keep_seed` meets
            `preserve_function` or a perturbation.
    """
    if getattr(model, "is_quantized", False):
        raise InputError(
            "`model` is quantised, and experts are copies of whole weights: upcycle what it was before, and quantise "
            "the result."
        )
    _check_arguments(keep_seed, preserve_function, perturbation)
    if gumbel_noise is None:
        training_routing = fields.get("training_routing", model.config.training_routing)
        gumbel_noise = 1.0 if training_routing in rule_names(takes_noise=True) else 0.0
    config = upcycled_config(
        model.config,
        num_experts,
        keep_seed,
        expert_intermediate_size,
        gumbel_noise=gumbel_noise,
        gumbel_noise_steps=gumbel_noise_steps,
        **({"normalize_gates": True} if preserve_function else {}),
        **fields,
    )
    attention = model.config._attn_implementation
    upcycled = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=attention)
    upcycled.to(model.device)
    seed_state, state = model.state_dict(), upcycled.state_dict()
    sources = tensor_sources(state, seed_state, kept_groups(model.config, config) if keep_seed else [])
    for name, tensor in state.items():
        if sources[name]:
            tensor.copy_(_tensor_of(name, tensor, sources[name], seed_state, perturbation, fields))
        elif name.endswith(".experts.down_proj"):
            # fresh experts start with a zero output
            tensor.zero_()
    _check_used(seed_state, sources, fields)
    upcycled.generation_config = deepcopy(model.generation_config)
    return upcycled.train(model.training)


def _check_arguments(keep_seed: bool, preserve_function: bool, perturbation: float):
    if not 0 <= perturbation < float("inf"):
        raise InputError(f"`perturbation` = {perturbation}: a standard deviation is a finite number, 0 or more.")
    if not keep_seed:
        return
    if perturbation:
        raise InputError(
            f"`perturbation` = {perturbation} does not go with `keep_seed`: it tells copies apart, and experts beside "
            "the seed's network are no copies but fresh."
        )
    if preserve_function:
        raise InputError(
            "`preserve_function` does not go with `keep_seed`, which preserves the function for every token already. "
            "Normalised gates for their own sake are the field normalize_gates=True."
        )


def _check_used(seed_names: Collection[str], sources: Mapping[str, Sequence[str]], fields: dict) -> None:
    """Raise where the result would lack what the source has learnt; routers that it has no use for may go."""
    used = {source for parts in sources.values() for source in parts}
    unused = sorted(name for name in seed_names if name not in used and "router" not in name)
    if unused:
        raise InputError(
            f"`fields` = {sorted(fields)}: {len(unused)} tensors of the seed would be lost, {unused[0]} the first of "
            "them. Leave sizes, and what has weights, as they are in the seed."
        )


def _tensor_of(
    name: str,
    tensor: torch.Tensor,
    sources: Sequence[str],
    seed_state: Mapping[str, torch.Tensor],
    perturbation: float,
    fields: dict,
) -> torch.Tensor:
    """Return what a tensor of the result becomes, joined from its sources."""
    parts = [seed_state[source] for source in sources if source in seed_state]
    if parts and ".experts." in name:
        joined = torch.stack([torch.cat([_perturbed(part, perturbation) for part in parts]) for _ in tensor])
    elif len(parts) > 1:
        # networks side by side: inner units are rows of gate and up projections, and columns of the down projection
        joined = torch.cat(parts, dim=1 if "down_proj" in name else 0)
    else:
        joined = parts[0] if parts else None
    if joined is None or joined.shape != tensor.shape:
        raise InputError(
            f"`model` has no {name} of shape {list(tensor.shape)} to copy. Is it a MomaForCausalLM, and do "
            f"`fields` = {sorted(fields)} leave its sizes as they are?"
        )
    return joined


def _perturbed(matrix: torch.Tensor, perturbation: float) -> torch.Tensor:
    if not perturbation:
        return matrix
    wide = matrix.float()
    return (wide + torch.randn_like(wide) * wide.std() * perturbation).to(matrix.dtype)
