# SPDX-License-Identifier: Apache-2.0
"""Images in messages: vLLM's multimodal processor puts their token ids where the placeholder stood."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoProcessor, BatchFeature
from transformers.utils import PROCESSOR_NAME
from transformers.utils.hub import cached_file
from vllm.multimodal.inputs import MultiModalFieldConfig  # pyright: ignore[reportMissingImports]
from vllm.multimodal.processing import (  # pyright: ignore[reportMissingImports]
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)


PLACEHOLDER = "<image>"
# key of the processor's output that holds the token ids of each image
IMAGE_IDS = "image_ids"


@lru_cache(maxsize=2)
def _processor(folder: str, revision: str | None) -> Any:
    return AutoProcessor.from_pretrained(folder, revision=revision)


class MomaMultiModalInfo(BaseProcessingInfo):
    """What vLLM asks of the processor that lies beside the model."""

    def get_hf_processor(self, **kwargs: Any) -> Any:
        """Return the processor of the model's folder."""
        model_config = self.ctx.model_config
        return _processor(model_config.model, model_config.revision)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Allow any number of images, or none where the folder has no processor or the model no frame for them."""
        model_config = self.ctx.model_config
        found = cached_file(
            model_config.model,
            PROCESSOR_NAME,
            revision=model_config.revision,
            _raise_exceptions_for_missing_entries=False,
        )
        return {"image": None} if found and "image" in model_config.hf_config.frames else {}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """Return no arguments: an image has one size."""
        return {}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the codes of an image."""
        return {"image": self.ctx.model_config.hf_config.image_seq_length}


class MomaDummyInputs(BaseDummyInputsBuilder):
    """What vLLM measures its memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return a placeholder for each image."""
        return PLACEHOLDER * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """Return white images."""
        height, width = self.info.get_hf_processor().image_size
        count = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count)}


class MomaMultiModalProcessor(BaseMultiModalProcessor):
    """Codes of images by the model's own processor; they are computed where requests come in."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        processor = self.info.get_hf_processor()
        codes = torch.tensor(processor.encode_images(list(hf_data["images"])))
        return BatchFeature({IMAGE_IDS: codes + processor.image_token_offset})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        return {IMAGE_IDS: MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        processor = self.info.get_hf_processor()

        def image(index: int) -> Any:
            ids = out_mm_kwargs["image"][index][IMAGE_IDS].data.flatten().tolist()
            frame = [processor.begin_image_token_id, *ids, processor.end_image_token_id]
            return PromptUpdateDetails.select_token_ids(frame, processor.image_token_ids)

        return [PromptReplacement(modality="image", target=[processor.image_token_id], replacement=image)]
