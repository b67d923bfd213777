# SPDX-License-Identifier: Apache-2.0
"""A start for the embeddings of image codes."""

import torch
from transformers import PreTrainedModel

from ..errors_moma import InputError


@torch.no_grad()
def initialize_code_embeddings(model: PreTrainedModel, codebook_KC: torch.Tensor, modality: str = "image"):
    """Give the tokens of similar codes similar embeddings: a random projection of the codebook that they come from.

    Distances between codes survive the projection, so what the model learns of one code holds for its neighbours from
    the start. Ids of the modality are taken in ascending order.

    Args:
        model (`PreTrainedModel`):
            a fresh `MomaForCausalLM` or `MomaModel`; changed in place.
        codebook_KC (`torch.Tensor`):
            one vector for each code, `[K, C]`.
        modality (`str`, *optional*, defaults to `"image"`):
            whose tokens.

    Raises:
        ValueError: the modality has another number of ids than the codebook has vectors, or all of these are equal.
    """
    config = model.config
    ids = torch.cat([torch.arange(start, stop) for start, stop in config.modality_token_ranges[modality]])
    if len(ids) != codebook_KC.shape[0]:
        raise InputError(
            f"`codebook_KC` has {codebook_KC.shape[0]} vectors, but `modality_token_ranges` gives {modality!r} "
            f"{len(ids)} ids. Is it the codebook of this processor's image tokenizer?"
        )
    embeddings: torch.Tensor = model.get_input_embeddings().weight  # pyright: ignore[reportAssignmentType]
    centred_KC = codebook_KC.float() - codebook_KC.float().mean(0)
    if (codebook_KC == codebook_KC[0]).all():
        raise InputError(
            f"`codebook_KC`: all of its {len(ids)} vectors are equal, so that no codes are more alike than others. Is "
            "it the codebook of a trained image tokenizer?"
        )
    projected_KD = centred_KC @ torch.randn(codebook_KC.shape[1], config.hidden_size)
    projected_KD *= config.initializer_range / projected_KD.std()
    embeddings[ids] = projected_KD.to(embeddings)
