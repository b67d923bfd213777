# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a source checkpoint each tensor of the upcycled model is made of, by names."""

import re
from collections.abc import Collection

from ..configuration_moma import MomaConfig


_EXPERTS = re.compile(r".*\.groups\.(?P<name>[^.]+)\.experts\.\w+")
_SHARED_EXPERT = re.compile(r"(?P<layer>.*\.mlp)\.(?:groups\.(?P<name>[^.]+)\.)?shared_expert\.(?P<matrix>.*)")
# matrices of a network that are packed into a parameter of experts
_PACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def shared_size(config: MomaConfig, group: str) -> int:
    """Return inner width of all shared experts that a group's tokens pass."""
    return config.common_shared_intermediate_size + config.group_shared_intermediate_size(group)


def kept_groups(seed: MomaConfig, upcycled: MomaConfig) -> list[str]:
    """Return groups whose shared expert holds the source's network, beside experts that are fresh."""
    return [
        group
        for group in upcycled.expert_groups
        if upcycled.group_num_experts(group) > 1 and shared_size(upcycled, group) > shared_size(seed, group)
    ]


def tensor_sources(names: Collection[str], seed_names: Collection[str], kept: Collection[str]) -> dict[str, list[str]]:
    """Return which of the source's tensors each tensor of the result is made of."""
    return {name: _sources(name, seed_names, kept) for name in names}


def _sources(name: str, seed_names: Collection[str], kept: Collection[str]) -> list[str]:
    # a dense source has one group, `all`, that every modality's group is made of
    alike = (name, re.sub(r"\.groups\.[^.]+\.", ".groups.all.", name))
    shared, experts = _SHARED_EXPERT.fullmatch(name), _EXPERTS.fullmatch(name)
    if shared:
        found = [part for part in _shared_from(shared, kept) if part in seed_names]
    elif experts:
        if experts["name"] in kept:
            return []
        found = next((parts for parts in map(_packed_from, alike) if parts[0] in seed_names), [])
    elif "router" in name and name not in seed_names:
        return []
    else:
        found = [source for source in alike if source in seed_names][:1]
    return found or [name]


def _shared_from(shared: re.Match, kept: Collection[str]) -> list[str]:
    layer, group = shared["layer"], shared["name"] or "all"
    networks = [f"{layer}.groups.{group}.mlp", f"{layer}.groups.all.mlp"] if group in kept else []
    networks += [f"{layer}.groups.{group}.shared_expert", f"{layer}.shared_expert"]
    return [f"{network}.{shared['matrix']}" for network in dict.fromkeys(networks)]


def _packed_from(name: str) -> list[str]:
    group, _, packed = name.partition(".experts.")
    return [f"{group}.mlp.{matrix}.weight" for matrix in _PACKED[packed]]
