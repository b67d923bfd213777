# SPDX-License-Identifier: Apache-2.0
"""What one forward tells all its layers, and what their routers leave behind in it.

Shape suffixes:
    B rows, T positions, H heads, Q queries, S keys, C cuts of a router (one for each expert, or for each pool of a
    depth router).
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from .modality_split_moma import FixedSplit, ModalitySplit


if TYPE_CHECKING:
    from .router_base_moma import MomaRouterBase


_TENSORS = ("modality_BT", "padding_BT", "document_BT", "custom_mask_BHQS")


def is_distributed() -> bool:
    """Whether other processes take part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def logistic_noise_like(logits: torch.Tensor) -> torch.Tensor:
    """Differences of two independent Gumbel samples, `G' - G''` of MoMa equation 5: standard logistic samples."""
    return torch.rand_like(logits).logit(eps=1e-6)


class RouterState(NamedTuple):
    """What a router selects with: its buffers of these names, as they were when the forward met it."""

    threshold: torch.Tensor
    balance_bias: torch.Tensor
    num_updates: torch.Tensor


class RoutingContext:
    """What one forward of the model tells all its layers, and what their routers leave behind.

    Not a dataclass: FSDP rebuilds the dataclasses, dicts and lists among a layer's arguments when it casts them, and
    what routers leave in such a copy is lost. Objects of other classes go through as they are.

    Args:
        routing (`str`): a name of `RULES`, for experts.
        split (`ModalitySplit` or `FixedSplit`): positions of each group.
        track (`bool`): whether routers record statistics (in training steps, which have gradients).
        depth_routing (`str`, *optional*): a name of `RULES`, for depth layers.
        modality_BT (`torch.LongTensor`, *optional*): modality of each position, `[B, T]`.
        padding_BT (`torch.BoolTensor`, *optional*): True where a position is padding, `[B, T]`.
        document_BT (`torch.LongTensor`, *optional*): document of each position in packed rows, `[B, T]`.
        custom_mask_BHQS (`torch.Tensor`, *optional*): the caller's own attention mask, as it came.
        runs_all_groups (`bool`, *optional*, defaults to `True`): whether groups without a token run, too: their
            weights take part in every training step and wherever processes wait for one another, and where routers
            are recorded each has its entry.
        may_wait (`bool`, *optional*, defaults to `True`): whether layers may ask the device for numbers.
        is_step (`bool`, *optional*, defaults to `False`): whether these are a few tokens on a CPU, without gradients,
            with the experts implementation `"moma"` and nobody who observes it: groups may then run their experts
            without going through the interface.

    Attributes:
        statistics (`dict`): cuts of this batch alone, shortfalls of load and votes, by router. Recomputation under
            activation checkpointing writes the same entry again, so a step counts once.
        state (`dict`): [`RouterState`] by router.
        noise (`dict`): the noise that each router drew, before it is scaled.
    """

    def __init__(
        self,
        routing: str,
        split: ModalitySplit | FixedSplit,
        track: bool = False,
        depth_routing: str | None = None,
        modality_BT: torch.Tensor | None = None,
        padding_BT: torch.Tensor | None = None,
        document_BT: torch.Tensor | None = None,
        custom_mask_BHQS: torch.Tensor | None = None,
        runs_all_groups: bool = True,
        may_wait: bool = True,
        is_step: bool = False,
    ):
        self.routing = routing
        # both are given wherever there are depth layers
        self.depth_routing: str = depth_routing  # pyright: ignore[reportAttributeAccessIssue]
        self.modality_BT: torch.Tensor = modality_BT  # pyright: ignore[reportAttributeAccessIssue]
        self.split = split
        self.track = track
        self.padding_BT, self.document_BT = padding_BT, document_BT
        self.custom_mask_BHQS = custom_mask_BHQS
        self.runs_all_groups, self.may_wait, self.is_step = runs_all_groups, may_wait, is_step
        self.statistics: dict[MomaRouterBase, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.state: dict[MomaRouterBase, RouterState] = {}
        self.noise: dict[MomaRouterBase, torch.Tensor] = {}
        self._by_device: dict[torch.device, RoutingContext] = {}

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether no shape may depend on who chooses whom."""
        return isinstance(self.split, FixedSplit)

    def to(self, device: torch.device | int | str, non_blocking: bool = False) -> "RoutingContext":
        """The same context for layers on another device, which Accelerate's hooks ask for; what routers leave behind
        lies in this one.

        Args:
            device (`torch.device`, `int` or `str`): of the layer.
            non_blocking (`bool`, *optional*, defaults to `False`): as in `torch.Tensor.to`.
        """
        device = torch.device(device)
        if device == self.split.group_BT.device:
            return self
        # once for all layers of a device
        if device not in self._by_device:
            tensors = {name: getattr(self, name) for name in _TENSORS}
            moved = {
                name: None if tensor is None else tensor.to(device, non_blocking=non_blocking)
                for name, tensor in tensors.items()
            }
            self._by_device[device] = self._view(split=self.split.to(device, non_blocking), **moved)
        return self._by_device[device]

    def with_split(self, split: ModalitySplit) -> "RoutingContext":
        """The same context for a part of the tokens; what routers leave behind lies in this one."""
        return self._view(split=split)

    def with_waits(self) -> "RoutingContext":
        """The same context, in which layers may ask the device for numbers."""
        return self if self.may_wait else self._view(may_wait=True)

    def with_routing(self, routing: str, track: bool = False) -> "RoutingContext":
        """A context of its own for the same tokens, in which experts and depth layers choose by another rule."""
        return self._copy(routing=routing, depth_routing=routing, track=track)

    def _copy(self, **changes: Any) -> "RoutingContext":
        names = ("routing", "split", "track", "depth_routing", "runs_all_groups", "may_wait", "is_step", *_TENSORS)
        return RoutingContext(**{**{name: getattr(self, name) for name in names}, **changes})

    def _view(self, **changes: Any) -> "RoutingContext":
        view = self._copy(**changes)
        view.statistics, view.state, view.noise = self.statistics, self.state, self.noise
        return view

    def router_state(self, router: "MomaRouterBase") -> "RouterState | MomaRouterBase":
        """Buffers of a router to select with.

        In training they are kept from the forward: recomputation under activation checkpointing comes after
        `update_routers` and has to select the same tokens again.
        """
        if not self.track:
            return router
        if router not in self.state:
            buffers = (router.threshold, router.balance_bias, router.num_updates)
            self.state[router] = RouterState(*(buffer.clone() for buffer in buffers))
        return self.state[router]

    def router_noise(self, router: "MomaRouterBase", logits: torch.Tensor) -> torch.Tensor:
        """Noise for a router's logits, drawn once: recomputation may come with another state of the generator."""
        if router not in self.noise:
            self.noise[router] = logistic_noise_like(logits)
        return self.noise[router]

    def record(
        self, router: "MomaRouterBase", threshold_C: torch.Tensor, shortfall_C: torch.Tensor, votes_C: torch.Tensor
    ):
        """Keep what `update_routers` needs of one router's step, for each of its `C` cuts.

        Args:
            router (`MomaRouterBase`): whose.
            threshold_C (`torch.Tensor`): midway between the K-th best score and the next, see [`batch_thresholds`].
            shortfall_C (`torch.Tensor`): by how much the load lags behind its target, as a share of the tokens.
            votes_C (`torch.Tensor`): 1, or 0 where this process had no token to judge by.
        """
        self.statistics[router] = (threshold_C, shortfall_C, votes_C)
