# SPDX-License-Identifier: Apache-2.0
"""The model as vLLM runs it: the package's own decoder in vLLM's Transformers backend, with images in messages."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.interfaces import SupportsMultiModal  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.transformers import TransformersForCausalLM  # pyright: ignore[reportMissingImports]
from vllm.multimodal import MULTIMODAL_REGISTRY  # pyright: ignore[reportMissingImports]

from ...errors_moma import InputError
from ...routing_moma import Fp32Linear
from .images import IMAGE_IDS, PLACEHOLDER, MomaDummyInputs, MomaMultiModalInfo, MomaMultiModalProcessor


@MULTIMODAL_REGISTRY.register_processor(
    MomaMultiModalProcessor,
    info=MomaMultiModalInfo,
    dummy_inputs=MomaDummyInputs,
)
class MomaForVllm(TransformersForCausalLM, SupportsMultiModal):
    """A MoMa without depth layers.

    An image is token ids like a word, so the model takes ids and nothing else: what vLLM calls the embeddings of an
    image is what the ids give anyway.
    """

    # token ids decide the modality, and by it the experts
    requires_raw_input_tokens = True

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return what stands for an image in a message whose template takes strings alone."""
        return PLACEHOLDER if modality == "image" else None

    def recursive_replace(self) -> None:
        """Put vLLM's layers in the place of the model's, but for those that multiply in fp32, as auxiliary routers."""
        kept = [
            (module, name, child)
            for module in self.model.modules()
            for name, child in module.named_children()
            if isinstance(child, Fp32Linear)
        ]
        super().recursive_replace()
        for module, name, child in kept:
            setattr(module, name, child)

    def get_language_model(self) -> nn.Module:
        """Return the whole model."""
        return self.model

    def embed_input_ids(
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *, is_multimodal: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the embeddings of words and codes alike; those of images are the same again."""
        return self.model.get_input_embeddings()(input_ids)

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """Return the embeddings of the codes of each image."""
        images = kwargs.get(IMAGE_IDS)
        return [] if images is None else [self.embed_input_ids(ids.flatten()) for ids in images]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run one step over the tokens of all requests, `[tokens]`, and return hidden states `[tokens, width]`."""
        if input_ids is None:
            raise InputError("`input_ids` is missing: embeddings alone do not tell which experts serve a token.")
        return super().forward(input_ids, positions, intermediate_tensors, None)
