# SPDX-License-Identifier: Apache-2.0
"""The causal loss with its parts: each modality's mean, and the z-loss that keeps the softmax's normaliser near 1."""

from dataclasses import dataclass

import torch
from torch import nn

from .configuration_moma import MomaConfig
from .modality_split_moma import token_modalities


@dataclass
class MomaLoss:
    """A loss to minimise and the plain figures behind it.

    Attributes:
        loss (`torch.Tensor`): scalar, with modality weights and z-loss in training; plain cross-entropy otherwise.
        modality_losses (`dict[str, torch.Tensor]`): mean cross-entropy in nats of each modality's target tokens,
            detached; 0 for a modality without targets.
        modality_tokens (`dict[str, torch.Tensor]`): number of those targets.
    """

    loss: torch.Tensor
    modality_losses: dict[str, torch.Tensor]
    modality_tokens: dict[str, torch.Tensor]


def causal_lm_loss(
    config: MomaConfig,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    training: bool,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> MomaLoss:
    """Next-token cross-entropy, shifted and normalised as `ForCausalLMLoss` of Transformers does it.

    Both need the loss of single tokens, which the library's function does not give; without weights and z-loss the two
    are equal.

    Args:
        config (`MomaConfig`): ranges of the modalities, `modality_loss_weights`, `z_loss_coef`.
        logits (`torch.Tensor`): `[B, T, V]`.
        labels (`torch.LongTensor`): `[B, T]`, `ignore_index` where no loss is wanted; token t is compared with the
            logits at t - 1.
        training (`bool`): whether to apply modality weights and z-loss.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): divisor of the sum; the number of targets by default.
        shift_labels (`torch.LongTensor`, *optional*): targets that are shifted already; replaces `labels`.
        attention_mask (`torch.Tensor`, *optional*): `[B, S]`, its last `T` columns those of the logits, 0 at padding.
            A padding position is no target and predicts none, on either side. Masks of other forms are passed over.
    """
    if shift_labels is None:
        wide_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)  # pyright: ignore[reportArgumentType]
        shift_labels = wide_labels[..., 1:]
    shift_labels = shift_labels.to(logits.device)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        is_token_BT = attention_mask[:, -shift_labels.shape[-1] :].to(logits.device) != 0
        is_target_BT = nn.functional.pad(is_token_BT, (0, 1), value=True)[:, 1:]
        shift_labels = shift_labels.masked_fill(~(is_token_BT & is_target_BT), ignore_index)
    targets = shift_labels.reshape(-1)
    logits = logits.float().reshape(-1, logits.shape[-1])
    token_losses = nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    valid = targets != ignore_index
    modality = torch.where(valid, token_modalities(config, targets), -1)

    weighted = token_losses
    if training and config.modality_loss_weights:
        weights = [config.modality_loss_weights.get(name, 1.0) for name in config.modalities]
        # the last entry is that of ignored targets, index -1
        weighted = token_losses * token_losses.new_tensor([*weights, 0.0])[modality]
    if training and config.z_loss_coef:
        target_logits = logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        log_z = (target_logits + token_losses).masked_fill(~valid, 0.0)
        weighted = weighted + config.z_loss_coef * log_z.square()
    divisor = valid.sum() if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(divisor):
        divisor = divisor.to(weighted.device)

    losses, counts = {}, {}
    for index, name in enumerate(config.modalities):
        member = modality == index
        counts[name] = member.sum()
        losses[name] = (token_losses.detach() * member).sum() / counts[name].clamp(min=1)
    return MomaLoss(weighted.sum() / divisor, losses, counts)
