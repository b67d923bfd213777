# SPDX-License-Identifier: Apache-2.0
"""The causal loss with its parts: each modality's mean, and the z-loss that keeps the softmax's normaliser near 1.

Shape suffixes:
    B rows, T positions, D hidden size, V vocabulary, N positions in one line, n of them in a chunk, S either D or V.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.modeling_utils import slice_logits_to_keep

from .configuration_moma import MomaConfig
from .devices_moma import gradients_again, is_on_cpu, is_transformed
from .errors_moma import InputError
from .token_groups_moma import token_modalities


# on a CPU, the head computes logits of so many positions at a time
CHUNK = 256
# on other devices, logits of a chunk take so many bytes, as many small chunks would mean many kernel launches
_CHUNK_BYTES = 2**28


@dataclass
class MomaLoss:
    """A loss to minimise and the plain figures behind it.

    Attributes:
        loss (`torch.Tensor`):
            scalar, with modality weights and z-loss in training; plain cross-entropy otherwise.
        modality_losses (`dict[str, torch.Tensor]`):
            mean cross-entropy in nats of each modality's target tokens, detached; 0 for a modality without targets.
        modality_tokens (`dict[str, torch.Tensor]`):
            number of those targets.
    """

    loss: torch.Tensor
    modality_losses: dict[str, torch.Tensor]
    modality_tokens: dict[str, torch.Tensor]


def causal_lm_loss(
    config: MomaConfig,
    states: torch.Tensor,
    labels: torch.Tensor | None,
    training: bool,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    head: nn.Module | None = None,
    logits_to_keep: int | torch.Tensor = 0,
    **kwargs,
) -> MomaLoss:
    """Return next-token cross-entropy, shifted and normalised as `ForCausalLMLoss` of Transformers does it.

    Both need the loss of single tokens, which the library's function does not give; without weights and z-loss the two
    are equal.

    With a head, the logits of a chunk of positions exist at once. Gradients are then computed with the loss, chunk by
    chunk, so that nothing is computed twice; they cannot be differentiated again.
    """
    if shift_labels is None and isinstance(logits_to_keep, torch.Tensor):
        raise InputError(
            "`labels` come with a tensor `logits_to_keep`, whose positions need not follow one another: give "
            "`shift_labels`, for each of these positions the token after it."
        )
    states_NS = states.reshape(-1, states.shape[-1])
    _check_labels(labels, shift_labels, states)
    target_N = _targets(labels, shift_labels, attention_mask, ignore_index, states.device, logits_to_keep)
    # -1: no loss at this position
    modality_N = torch.where(target_N != ignore_index, token_modalities(config, target_N), -1)
    weight_N = modality_weights(config, modality_N) if training and config.modality_loss_weights else None
    z_loss_coef = config.z_loss_coef if training else 0.0

    def terms(logits_NV: torch.Tensor, rows: slice):
        part_N, weights = target_N[rows], None if weight_N is None else weight_N[rows]
        token_terms = _ChunkedTerms.apply if _may_chunk(logits_NV) else _plain_terms
        weighted_N, loss_N = token_terms(logits_NV, part_N, weights, z_loss_coef, ignore_index)
        return weighted_N.sum(), loss_N.detach()

    if head is None:
        total, loss_N = terms(states_NS, slice(None))
    else:
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        if not torch.is_grad_enabled():
            # `needs_input_grad` is also set under `no_grad`, and then asks for gradients that nobody needs
            states_NS, parameters = states_NS.detach(), []
        chunk_size = CHUNK
        if not is_on_cpu(states):
            chunk_size = max(CHUNK, _CHUNK_BYTES // (config.vocab_size * torch.float32.itemsize))
        total, loss_N = _ChunkedSum.apply(head, terms, chunk_size, states_NS, *parameters)
    return _summary(config, total, loss_N, modality_N, num_items_in_batch)


class _ChunkedSum(torch.autograd.Function):
    """A sum over chunks of rows whose gradients are found as they come."""

    @staticmethod
    def forward(
        ctx,
        head,
        terms,
        chunk_size: int,
        x_ND: torch.Tensor,
        *parameters: torch.Tensor,
    ):
        needs_grad = any(ctx.needs_input_grad)
        total, losses, grads = x_ND.new_zeros((), dtype=torch.float32), [], []
        sums: list[torch.Tensor] = []
        for index, chunk_ND in enumerate(x_ND.split(chunk_size)):
            with torch.set_grad_enabled(needs_grad):
                chunk_ND = chunk_ND.detach().requires_grad_(needs_grad)
                part, loss_N = terms(head(chunk_ND), slice(index * chunk_size, (index + 1) * chunk_size))
            total += part.detach()
            losses.append(loss_N)
            if needs_grad:
                grad_ND, *own = torch.autograd.grad(part, [chunk_ND, *parameters])
                grads.append(grad_ND)
                # summed in fp32, as sums of many chunks would lose precision in bf16
                sums = [before.add_(new) for before, new in zip(sums, own)] if sums else [new.float() for new in own]
                # freed before the next chunk makes its own gradients
                del own
        if needs_grad:
            ctx.save_for_backward(torch.cat(grads), *sums)
            ctx.dtypes = [x_ND.dtype, *(parameter.dtype for parameter in parameters)]
        loss_N = torch.cat(losses)
        ctx.mark_non_differentiable(loss_N)
        return total, loss_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: torch.Tensor, _):
        grad_ND, *gradients = (
            # scaled in fp32: rounding the scale to bf16 would put the same error into all gradients
            (gradient.float() * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, None, grad_ND, *gradients


def modality_weights(config: MomaConfig, modality_N: torch.Tensor) -> torch.Tensor:
    """Return the weight of each target in training, by `modality_loss_weights`."""
    weights, weight_N = config.modality_loss_weights or {}, torch.zeros_like(modality_N, dtype=torch.float32)
    for index, name in enumerate(config.modalities):
        # a tensor of weights would need a copy to the device
        weight_N = torch.where(modality_N == index, weights.get(name, 1.0), weight_N)
    return weight_N


def _check_labels(labels: torch.Tensor | None, shift_labels: torch.Tensor | None, states: torch.Tensor) -> None:
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    if given is not None and given.numel() != states.shape[:-1].numel():
        raise InputError(
            f"`{name}` has the shape {tuple(given.shape)}, but there are logits of {tuple(states.shape[:-1])} places, "
            "of which each needs one label. With `logits_to_keep`, give the labels of what it keeps."
        )


def _targets(
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    ignore_index: int,
    device: torch.device,
    logits_to_keep: int | torch.Tensor,
) -> torch.Tensor:
    """Return what each position has to predict, in one line."""
    if shift_labels is None:
        wide_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)  # pyright: ignore[reportArgumentType]
        shift_labels = wide_labels[..., 1:]
    shift_labels = shift_labels.to(device, torch.long)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        is_token_BS = attention_mask.to(device) != 0
        is_target_BS = is_token_BS & nn.functional.pad(is_token_BS, (0, 1), value=True)[:, 1:]
        is_target_BT = slice_logits_to_keep(is_target_BS.unsqueeze(-1), logits_to_keep).squeeze(-1)
        shift_labels = shift_labels.masked_fill(~is_target_BT[..., -shift_labels.shape[-1] :], ignore_index)
    return shift_labels.reshape(-1)


# positions whose fp32 logits are computed at a time: few enough to stay in the CPU's caches
_TERMS_CHUNK = 32


def _may_chunk(logits_NV: torch.Tensor) -> bool:
    """Return whether terms are computed a few positions at a time, by [`_ChunkedTerms`]."""
    return logits_NV.requires_grad and is_on_cpu(logits_NV) and not is_transformed()


class _ChunkedTerms(torch.autograd.Function):
    """[`_plain_terms`] without an fp32 copy of all logits or their logarithms, and with a gradient written once."""

    @staticmethod
    def forward(ctx, logits_NV: torch.Tensor, target_N: torch.Tensor, weight_N, z_loss_coef: float, ignore_index: int):
        ctx.plain = partial(
            _plain_terms, target_N=target_N, weight_N=weight_N, z_loss_coef=z_loss_coef, ignore_index=ignore_index
        )
        is_target_N = target_N != ignore_index
        target_N1 = torch.where(is_target_N, target_N, 0).unsqueeze(1)
        loss_N = torch.empty_like(target_N, dtype=torch.float32)
        log_z_N = torch.empty_like(loss_N)
        # n positions at a time
        chunks = zip(*(x.split(_TERMS_CHUNK) for x in (logits_NV, target_N1, loss_N, log_z_N)), strict=True)
        for logits_nV, target_n1, loss_n, log_z_n in chunks:
            logits_nV = logits_nV.float()
            loss_n.copy_(nn.functional.cross_entropy(logits_nV, target_n1.squeeze(1), reduction="none"))
            torch.add(logits_nV.gather(1, target_n1).squeeze(1), loss_n, out=log_z_n)
        loss_N.masked_fill_(~is_target_N, 0.0)
        weight_N = is_target_N.float() if weight_N is None else weight_N * is_target_N
        z_weight_N = z_loss_coef * is_target_N
        ctx.save_for_backward(logits_NV, target_N1, log_z_N, weight_N, z_weight_N)
        ctx.mark_non_differentiable(loss_N)
        return loss_N * weight_N + z_loss_coef * log_z_N.masked_fill(~is_target_N, 0.0).square(), loss_N

    @staticmethod
    def backward(ctx, grad_N: torch.Tensor, _):
        logits_NV, target_N1, log_z_N, weight_N, z_weight_N = ctx.saved_tensors
        # with `create_graph`
        if torch.is_grad_enabled():
            return *gradients_again(lambda logits_NV: ctx.plain(logits_NV)[0], [logits_NV], grad_N), *[None] * 4
        # scales of the gradients through the softmax, and through the target's logit
        scale_N1 = (grad_N * (weight_N + 2 * z_weight_N * log_z_N)).unsqueeze(1)
        target_grad_N1 = (-grad_N * weight_N).unsqueeze(1)
        logits_grad_NV = torch.empty_like(logits_NV)
        values = logits_NV, logits_grad_NV, target_N1, log_z_N.unsqueeze(1), scale_N1, target_grad_N1
        for logits_nV, logits_grad_nV, target_n1, log_z_n1, scale_n1, target_grad_n1 in zip(
            *(x.split(_TERMS_CHUNK) for x in values), strict=True
        ):
            # copied even if fp32, as the next operations are in place
            softmax_nV = logits_nV.to(torch.float32, copy=True).sub_(log_z_n1).exp_()
            logits_grad_nV.copy_(softmax_nV.mul_(scale_n1).scatter_add_(1, target_n1, target_grad_n1))
        return logits_grad_NV, None, None, None, None


def _plain_terms(
    logits_NV: torch.Tensor,
    target_N: torch.Tensor,
    weight_N: torch.Tensor | None,
    z_loss_coef: float,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each token adds to the loss that is minimised, and its cross-entropy."""
    logits_NV = logits_NV.float()
    loss_N = nn.functional.cross_entropy(logits_NV, target_N, ignore_index=ignore_index, reduction="none")
    weighted_N = loss_N if weight_N is None else loss_N * weight_N
    if z_loss_coef:
        target_logit_N = logits_NV.gather(1, target_N.clamp(min=0).unsqueeze(1)).squeeze(1)
        log_z_N = (target_logit_N + loss_N).masked_fill(target_N == ignore_index, 0.0)
        weighted_N = weighted_N + z_loss_coef * log_z_N.square()
    return weighted_N, loss_N


def _summary(
    config: MomaConfig,
    total: torch.Tensor,
    loss_N: torch.Tensor,
    modality_N: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
) -> MomaLoss:
    divisor = (modality_N >= 0).sum() if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(divisor):
        divisor = divisor.to(total.device)
    losses, counts = {}, {}
    for index, name in enumerate(config.modalities):
        member_N = modality_N == index
        counts[name] = member_N.sum()
        losses[name] = (loss_N * member_N).sum() / counts[name].clamp(min=1)
    return MomaLoss(total / divisor, losses, counts)
