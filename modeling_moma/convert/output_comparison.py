# SPDX-License-Identifier: Apache-2.0
"""Outputs of two models on a probe batch, with the weights streamed from the disk module by module."""

from collections.abc import Callable, Iterator, Mapping

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook
from transformers import PreTrainedConfig, PreTrainedModel


# bound of the relative difference of logits in fp32
LARGEST_DIFFERENCE = 1e-3
NUM_ROWS, ROW_LENGTH, NUM_PADDED = 2, 16, 5


class ChangedWeights(Mapping):
    """Weights by name, each changed when it is asked for."""

    def __init__(self, weights: Mapping[str, torch.Tensor], change: Callable[[str, torch.Tensor], torch.Tensor]):
        self.weights, self.change = weights, change

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.change(name, self.weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def rounded_weights(weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> Mapping[str, torch.Tensor]:
    """Return weights in the type that a conversion writes, so that a probe shows its errors, not the rounding."""
    if dtype is None:
        return weights
    return ChangedWeights(weights, lambda name, tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def streamed_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """Return a model in eval mode that computes in fp32 and holds the weights of one module at a time."""
    # buffers that are not saved, as rotary frequencies, have to be real
    with init_empty_weights(include_buffers=False):
        model = model_class(config).float()
    attach_align_device_hook(
        model.eval(),
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=_TiedWeights(weights, model.all_tied_weights_keys),
        offload_buffers=True,
    )
    return model


def text_batch(token_ids: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a probe batch of two rows of 16 positions, one of them padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(token_ids), (NUM_ROWS, ROW_LENGTH), generator=generator)
    attention_mask = torch.ones_like(picks)
    attention_mask[0, :NUM_PADDED] = 0
    return {"input_ids": torch.tensor(token_ids)[picks], "attention_mask": attention_mask}


def relative_difference(source: torch.Tensor, converted: torch.Tensor) -> float:
    """Return `max |a - b| / max |a|` of the source's logits `a` and the converted model's logits `b`."""
    difference = (source.float() - converted.float()).abs().max()
    return float(difference / source.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def new_token_probability(logits: torch.Tensor, new_ids: list[int]) -> float:
    """Share of the softmax that falls on new tokens, all together, as the mean over positions."""
    return float(logits.float().softmax(dim=-1)[:, new_ids].sum(dim=-1).mean())


class _TiedWeights(Mapping):
    def __init__(self, weights: Mapping[str, torch.Tensor], tied: Mapping[str, str]):
        self.weights, self.tied = weights, tied

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[self.tied.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.weights, *(name for name in self.tied if name not in self.weights)])

    def __len__(self) -> int:
        return sum(1 for _ in self)
