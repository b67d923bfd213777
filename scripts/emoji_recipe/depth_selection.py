# SPDX-License-Identifier: Apache-2.0
"""What depth layers choose during a measurement: counted against batch top-k, and disturbed on purpose.

Shape suffixes:
    B rows, T positions, M modalities.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from modeling_moma.depth_moma import MomaDepthRouter


def depth_routers(model) -> dict[int, MomaDepthRouter]:
    """The depth routers of a `MomaForCausalLM` by layer.

    Raises:
        ValueError: the model has none.
    """
    layers = model.config.depth_layers
    if not layers:
        raise ValueError("`model` has no depth layers (`config.depth_layers` is empty). Is it the baseline?")
    return {layer: model.model.layers[layer].depth_router for layer in layers}


@contextmanager
def _hooked(routers, hook_of):
    handles = []
    try:
        for layer, router in routers.items():
            handles.append(router.register_forward_hook(hook_of(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def flipped_depth(model, sigma: float, seed: int = 0) -> Iterator[None]:
    """Within it, every depth decision of a model turns into its opposite with the probability `sigma`.

    The noise of MoMa section 4.6, which does not say how it was drawn. Decisions are flipped one by one, so a layer of
    capacity c takes c + (1 - 2 c) sigma of the tokens. A token that is flipped in weighs by its score like others.
    Padding is never flipped. The same seed flips the same decisions, and more of them the larger `sigma` is.

    Args:
        model: with depth layers.
        sigma: share of the decisions, in [0, 1].
        seed: of the flips.

    Raises:
        ValueError: `sigma` is no share, or the model has no depth layers.
    """
    if not 0 <= sigma <= 1:
        raise ValueError(f"`sigma` must be a share in [0, 1], got {sigma}: 0.5 % is 0.005.")
    generator = torch.Generator().manual_seed(seed)

    def flip(router, args, output):
        (_, context), (logits_BT, selection) = args, output
        chosen_BT = selection.chosen_BT
        # drawn on the CPU, where every device gets the same
        flip_BT = (torch.rand(chosen_BT.shape, generator=generator) < sigma).to(chosen_BT.device)
        if context.padding_BT is not None:
            flip_BT = flip_BT & ~context.padding_BT
        return logits_BT, replace(selection, chosen_BT=chosen_BT ^ flip_BT)

    with _hooked(depth_routers(model), lambda layer: flip):
        yield


class DepthTally:
    """Decisions of one depth layer.

    Attributes:
        tokens_M: tokens that were decided on, by modality.
        chosen_M: those that the layer processed.
        wrong_M: those on which top-k of the batch, given the same hidden states, differs.
    """

    def __init__(self, num_modalities: int):
        self.tokens_M, self.chosen_M, self.wrong_M = torch.zeros(3, num_modalities, dtype=torch.long)

    @property
    def error_rate(self) -> float:
        """Share of the decisions that differ from top-k of the batch."""
        return (self.wrong_M.sum() / self.tokens_M.sum()).item()

    def describe(self, modalities: list[str]) -> dict:
        """Load (share of the tokens that were chosen), overall and by modality, and the mix of the chosen tokens."""
        load_M = self.chosen_M / self.tokens_M.clamp(min=1)
        mix_M = self.chosen_M / self.chosen_M.sum().clamp(min=1)
        return {
            "load": (self.chosen_M.sum() / self.tokens_M.sum()).item(),
            "load_by_modality": dict(zip(modalities, load_M.tolist())),
            "mix_of_chosen": dict(zip(modalities, mix_M.tolist())),
            "error_rate": self.error_rate,
        }


@contextmanager
def watched_depth(model) -> Iterator[dict[int, DepthTally]]:
    """Within it, the depth decisions of a model are counted; gives the tallies by layer.

    Args:
        model: in eval mode, with depth layers. Within [`flipped_depth`], the flips are seen.

    Raises:
        ValueError: the model is in training mode, or has no depth layers.
    """
    if model.training:
        raise ValueError("`model` is in training mode, where routers keep statistics: call `model.eval()` first.")
    routers = depth_routers(model)
    num_modalities = len(model.config.modalities)
    tallies = {layer: DepthTally(num_modalities) for layer in routers}

    def counter(layer):
        def count(router, args, output):
            (hidden_BTD, context), (_, selection) = args, output
            # not by calling the router, which would end up here again
            _, best = router.forward(hidden_BTD, context.with_routing("expert_choice"))
            modality_BT = context.modality_BT
            if context.padding_BT is not None:
                modality_BT = torch.where(context.padding_BT, num_modalities, modality_BT)
            tally = tallies[layer]
            for total_M, is_counted_BT in (
                (tally.tokens_M, torch.ones_like(selection.chosen_BT)),
                (tally.chosen_M, selection.chosen_BT),
                (tally.wrong_M, selection.chosen_BT ^ best.chosen_BT),
            ):
                counts = torch.bincount(modality_BT[is_counted_BT], minlength=num_modalities + 1)
                total_M += counts[:num_modalities].cpu()

        return count

    with _hooked(routers, counter):
        yield tallies
