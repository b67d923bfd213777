# SPDX-License-Identifier: Apache-2.0
"""What routers of experts and of depth layers have in common: scores, and the state that inference selects with.

Shape suffixes:
    D hidden size.
"""

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .auxiliary_moma import Fp32Buffers, MomaAuxiliaryRouter
from .configuration_moma import MomaConfig
from .errors_moma import InputError


class MomaRouterBase(Fp32Buffers):
    """Sigmoid scores, and the state that lets a router choose without looking at other tokens.

    A score is the sigmoid of a projection, so it depends on its token alone. Everything is fp32: bf16 sigmoids tie,
    and a tie changes who is chosen.
    """

    # `None` in a model that has none
    auxiliary: MomaAuxiliaryRouter

    def __init__(
        self, config: MomaConfig, num_scores: int, num_cuts: int, momentum: float, updates_shape: tuple[int, ...] = ()
    ):
        super().__init__()
        self.momentum = momentum
        self.warmup_steps = config.routing_warmup_steps
        self.weight = nn.Parameter(torch.empty(num_scores, config.hidden_size, dtype=torch.float32))
        # an untrained router scores about 0.5
        self.threshold = nn.Buffer(torch.full((num_cuts,), 0.5, dtype=torch.float32))
        self.balance_bias = nn.Buffer(torch.zeros(num_cuts, dtype=torch.float32))
        self.num_updates = nn.Buffer(torch.zeros(updates_shape, dtype=torch.float32))
        self.auxiliary = (  # pyright: ignore[reportAttributeAccessIssue]
            MomaAuxiliaryRouter(config, num_scores, num_cuts) if config.auxiliary_routers else None
        )

    @property
    def is_frozen(self) -> bool:
        """Whether the router is as it will be: in a frozen group, or of a model under an adapter.

        It then keeps its cuts, so that the model stays as it was saved, and has neither noise nor warm-up.
        """
        return not self.weight.requires_grad

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to `[..., scores]`, in fp32 also under autocast."""
        self.widen_buffers()
        if self.auxiliary is not None:
            self.auxiliary.widen_buffers()
        with maybe_autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float())

    def predicted_scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Probabilities of membership by the auxiliary router, `[..., D]` to `[..., scores]`.

        Raises:
            ValueError: the model has no auxiliary routers.
        """
        if self.auxiliary is None:
            raise InputError(
                "`routing` or `depth_routing` = 'auxiliary' needs a model with config.auxiliary_routers=True; "
                "`moma train-auxiliary-routers` adds and trains them."
            )
        return torch.sigmoid(self.auxiliary(hidden_states))


__all__ = ["MomaRouterBase"]
