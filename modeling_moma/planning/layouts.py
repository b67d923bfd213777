# SPDX-License-Identifier: Apache-2.0
"""How GPUs share a model, and which layouts its sizes allow."""

from dataclasses import dataclass

from ..configuration_moma import MomaConfig
from ..errors_moma import InputError


@dataclass(frozen=True)
class Layout:
    """How GPUs share a model.

    Ranks are numbered with tensor parallelism innermost, then sharding, then replicas. Expert parallelism uses the
    ranks of a shard group: `expert` consecutive ones hold the experts of every group between them and exchange tokens.

    Attributes:
        replicate (`int`):
            copies of the sharded model: DDP with `shard=1`, HSDP otherwise.
        shard (`int`):
            ranks over which FSDP shards weights, gradients and moments.
        tensor (`int`):
            ranks that split attention heads and inner widths.
        expert (`int`):
            ranks that split the experts of each group.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.replicate * self.shard * self.tensor

    def __str__(self) -> str:
        if self.shard == 1:
            name = f"DDP {self.replicate}" if self.replicate > 1 else "one copy"
        elif self.replicate == 1:
            name = f"FSDP {self.shard}"
        else:
            name = f"HSDP {self.replicate} x {self.shard}"
        parts = [name, *(f"{label} {size}" for label, size in (("TP", self.tensor), ("EP", self.expert)) if size > 1)]
        return " + ".join(parts)

    def check(self, config: MomaConfig):
        """Refuse what the model's sizes forbid."""
        for name in ("replicate", "shard", "tensor", "expert"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"`{name}` must be a positive integer, got {size!r}.")
        for name, size in _tensor_sizes(config).items():
            if size % self.tensor:
                raise InputError(f"`tensor` = {self.tensor} does not divide {name} ({size}).")
        if self.expert == 1:
            return
        if self.shard % self.expert:
            raise InputError(f"`expert` = {self.expert} does not divide the shard group ({self.shard}).")
        counts = [config.group_num_experts(group) for group in config.expert_groups]
        if max(counts) == 1:
            raise InputError(f"`expert` = {self.expert}: the model has no group of several experts.")
        for group, count in zip(config.expert_groups, counts, strict=True):
            if count > 1 and count % self.expert:
                raise InputError(f"`expert` = {self.expert} does not divide the {count} experts of group {group!r}.")
            # Transformers splits the experts of an expert-parallel rank over the rest of the group, each unsplit
            if count > 1 and self.shard * self.tensor > count:
                raise InputError(
                    f"`expert` = {self.expert} in shard groups of {self.shard * self.tensor}: the {count} experts of "
                    f"group {group!r} are not enough for a part on every rank. Use more replicas of smaller groups."
                )


def _tensor_sizes(config: MomaConfig) -> dict[str, int]:
    sizes = {name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads", "vocab_size")}
    for group in config.expert_groups:
        sizes[f"the inner width of {group!r} experts"] = config.group_intermediate_size(group)
        shared = config.group_shared_intermediate_size(group) or config.common_shared_intermediate_size
        sizes[f"the inner width of {group!r} shared experts"] = shared
    return sizes
