# SPDX-License-Identifier: Apache-2.0
"""Training some expert groups, or low-rank adapters beside the weights, while all else stays as it is.

Shape suffixes: V vocabulary.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..configuration_moma import MomaConfig
from ..errors_moma import InputError
from ..frames_moma import TEXT
from ..modeling_moma import ByModality, MomaFeedForward, MomaForCausalLM, MomaPreTrainedModel, MomaUntiedAttention
from ..routing_moma import MomaAuxiliaryRouter
from ..token_groups_moma import token_modalities
from ..utils.errors import needs_extra


if TYPE_CHECKING:
    from peft import PeftModel


# handles of the hooks that keep rows of embeddings and heads as they are
_held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def freeze_groups(model: MomaPreTrainedModel, groups: list[str]) -> int:
    """Freeze the feed-forward weights of some expert groups, routers and shared experts included.

    Attention, norms, embeddings and head serve all modalities and go on learning: [`freeze_all_but`] freezes them,
    too. With `config.untied_attention` the groups' modalities have projections and norms of their own, which are
    frozen with them. Routers keep their thresholds and balance biases with their weights, so all that the state dict
    holds of a frozen group stays bit for bit. Where much else has been trained, [`calibrate_thresholds`] fits the
    thresholds to the hidden states of now.

    Args:
        model (`MomaPreTrainedModel`):
            a `MomaForCausalLM` or `MomaModel`; changed in place.
        groups (`list[str]`):
            names of `config.expert_groups`.

    Returns:
        `int`: parameters that were frozen.

    Raises:
        ValueError: the model has no such group.
    """
    check_groups(model.config, groups)
    frozen = 0
    for layer in _own_layers(model, groups):
        layer.requires_grad_(False)
        frozen += sum(parameter.numel() for parameter in layer.parameters())
    return frozen


def _modalities(config: MomaConfig, groups: Sequence[str]) -> list[str]:
    return [modality for group in set(groups) for modality in config.expert_groups[group]]


def _own_layers(model: MomaPreTrainedModel, groups: Sequence[str]) -> Iterator[nn.Module]:
    """Yield the layers that only tokens of some groups meet."""
    modalities = _modalities(model.config, groups)
    for module in model.modules():
        if isinstance(module, MomaFeedForward):
            yield from (module.groups[group] for group in set(groups))
        elif isinstance(module, ByModality):
            yield from (module[modality] for modality in modalities)
        elif isinstance(module, MomaUntiedAttention):
            yield from (module.modalities[modality] for modality in modalities)


def freeze_all_but(model: MomaPreTrainedModel, groups: list[str]) -> list[str]:
    """Freeze everything but some expert groups and the rows of their tokens in the embeddings and the head.

    With `config.untied_attention` projections and norms of the groups' modalities learn, too (as in LMFusion,
    arXiv 2412.15188). A text model that learns images keeps its words so: where no image stands before them they meet
    no weight that changes, and only the new tokens' logits beside theirs do. The rows are those of the groups' own
    tokens, and of those that begin and end their frames; what backward gives for all other rows is set to zero, by
    hooks that a copy of the model does not have. A second call takes the place of the first; [`unfreeze`] undoes both.

    Args:
        model (`MomaPreTrainedModel`):
            a `MomaForCausalLM` or `MomaModel`; changed in place. Its embeddings must not be sharded: FSDP and
            DeepSpeed make other tensors of them, which train in every row.
        groups (`list[str]`):
            names of `config.expert_groups` that go on learning.

    Returns:
        `list[str]`: names of the matrices of which single rows learn. An optimizer's weight decay would shrink all
        rows of them, so leave it out there, as `moma pretrain --train-groups` does.

    Raises:
        ValueError: the model has no such group, or `groups` is empty.
    """
    check_groups(model.config, groups)
    if not groups:
        raise InputError("`groups` is empty: nothing would learn.")
    model.requires_grad_(False)
    for layer in _own_layers(model, groups):
        layer.requires_grad_(True)
    is_learning_V = learning_tokens(model.config, _modalities(model.config, groups))
    heads = [model.get_input_embeddings(), model.get_output_embeddings()]
    matrices = {id(head.weight): head.weight for head in heads if head is not None}
    for weight in matrices.values():
        weight.requires_grad_(True)
        _let_go(weight)
        _held[weight] = weight.register_hook(_keep_rows(is_learning_V))
    return [name for name, parameter in model.named_parameters() if id(parameter) in matrices]


def unfreeze(model: MomaPreTrainedModel) -> None:
    """Let a model learn in all its weights again, but for auxiliary routers, which have a training of their own.

    Args:
        model (`MomaPreTrainedModel`):
            after [`freeze_groups`] or [`freeze_all_but`]; changed in place.
    """
    model.requires_grad_(True)
    for parameter in model.parameters():
        _let_go(parameter)
    for module in model.modules():
        if isinstance(module, MomaAuxiliaryRouter):
            module.requires_grad_(False)


def _let_go(weight: torch.Tensor) -> None:
    if (handle := _held.pop(weight, None)) is not None:
        handle.remove()


def _keep_rows(is_kept_V: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a hook that sets the other rows of a gradient to zero."""
    weight_V1 = is_kept_V.unsqueeze(-1)

    def keep(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal weight_V1
        # copied to the device in the first backward alone
        weight_V1 = weight_V1.to(gradient)
        return gradient * weight_V1

    return keep


def check_groups(config: MomaConfig, groups: Sequence[str]):
    """Raise `ValueError` where a model has no such expert group."""
    unknown = sorted(set(groups) - set(config.expert_groups))
    if unknown:
        raise InputError(f"`groups` names {unknown}; the model's groups are {list(config.expert_groups)}.")


def learning_tokens(config: MomaConfig, modalities: Sequence[str]) -> torch.Tensor:
    """Return True for the tokens of some modalities and for those that begin and end their frames, `[V]`."""
    indices = torch.tensor([config.modalities.index(modality) for modality in modalities])
    is_theirs_V = torch.isin(token_modalities(config, torch.arange(config.vocab_size)), indices)
    for modality, frame in config.frames.items():
        if modality in modalities:
            is_theirs_V[[frame.begin, frame.end]] = True
    return is_theirs_V


_LINEAR = r"(gate_proj|up_proj|down_proj)"


def with_adapters(model: MomaForCausalLM, rank: int, frozen_groups: Sequence[str] = ()) -> "PeftModel":
    """Put adapters beside attention and expert groups, and let the rows of all tokens but those of text learn.

    Routers stay as they are. After training, `merge_and_unload()` gives the model with the adapters in its weights.
    """
    if rank < 1:
        raise InputError(f"`--lora-rank` = {rank}: a rank is at least 1.")
    with needs_extra("`--lora-rank` needs PEFT", "finetune"):
        from peft import LoraConfig, get_peft_model

    config = model.config
    check_groups(config, frozen_groups)
    learning = {group: members for group, members in config.expert_groups.items() if group not in frozen_groups}
    groups = "|".join(map(re.escape, learning))
    modalities = "|".join(re.escape(modality) for members in learning.values() for modality in members)
    # projections of a modality's own stay as they are with its group
    of_modality = rf"modalities\.({modalities})\." if config.untied_attention else ""
    networks = [rf"self_attn\.{of_modality}(q_proj|k_proj|v_proj|o_proj)", rf"mlp\.shared_expert\.{_LINEAR}"]
    if not groups and config.untied_attention and not config.common_shared_intermediate_size:
        raise InputError(
            f"`--freeze-groups` {list(frozen_groups)} leaves nothing that `--lora-rank` could adapt: with "
            "`untied_attention` all projections are those of a group's modalities."
        )
    if groups:
        networks.append(rf"groups\.({groups})\.(mlp|shared_expert)\.{_LINEAR}")
    packed = [name for name, _ in model.named_parameters() if groups and re.search(rf"\.({groups})\.experts\.", name)]
    new_modalities = [modality for modality in config.modalities if modality != TEXT]
    matrices = ["embed_tokens"] if config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    rows = learning_tokens(config, new_modalities).nonzero().flatten().tolist()
    adapters = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=rf".*\.({'|'.join(networks)})",
        target_parameters=packed or None,
        trainable_token_indices={name: rows for name in matrices} if rows else None,
    )
    return get_peft_model(model, adapters)  # pyright: ignore[reportReturnType]
