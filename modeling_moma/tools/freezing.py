# SPDX-License-Identifier: Apache-2.0
"""Training some expert groups while the others stay as they are."""

from transformers import PreTrainedModel

from ..experts_moma import MomaFeedForward


def freeze_groups(model: PreTrainedModel, groups: list[str]) -> int:
    """Freeze the feed-forward weights of whole expert groups, routers and shared experts included.

    Attention, norms, embeddings and head serve all modalities and go on learning. Routers keep their thresholds and
    balance biases with their weights, so all that the state dict holds of a frozen group stays bit for bit. Where much
    else has been trained, [`calibrate_thresholds`] fits the thresholds to the hidden states of now.

    Args:
        model: a `MomaForCausalLM` or `MomaModel`; changed in place.
        groups: names of `config.expert_groups`.

    Returns:
        Parameters that were frozen.

    Raises:
        ValueError: the model has no such group.
    """
    unknown = sorted(set(groups) - set(model.config.expert_groups))
    if unknown:
        raise ValueError(f"`groups` names {unknown}; the model's groups are {list(model.config.expert_groups)}.")
    frozen = 0
    for module in model.modules():
        if isinstance(module, MomaFeedForward):
            for group in set(groups):
                module.groups[group].requires_grad_(False)
                frozen += sum(parameter.numel() for parameter in module.groups[group].parameters())
    return frozen


__all__ = ["freeze_groups"]
