# SPDX-License-Identifier: Apache-2.0
"""What Transformers lacks for this model: entries of its tables, steps of its loop, the card that it writes.

Each names the version that needs it, so that a later one may drop it.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


# 5.24: saving writes only the saved class's own entry; these let every auto class load the folder by its code
AUTO_MAP = {
    "AutoConfig": "configuration_moma.MomaConfig",
    "AutoModel": "modeling_moma.MomaModel",
    "AutoModelForCausalLM": "modeling_moma.MomaForCausalLM",
    "AutoModelForImageTextToText": "modeling_moma.MomaForCausalLM",
    "AutoModelForMultimodalLM": "modeling_moma.MomaForCausalLM",
}

# 5.24: Trainer looks here by name for the labels that it smooths, and registered classes are not entered
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["moma"] = "MomaForCausalLM"  # pyright: ignore[reportArgumentType]
# 5.24: under FSDP2 torch gives the model's class another name
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["moma_fsdp"] = "FSDPMomaForCausalLM"  # pyright: ignore[reportArgumentType]

# options of generation that Transformers does not know
OWN_OPTIONS = ("generation_mode", "caption_suppress_tokens", "image_sampling")


if TYPE_CHECKING:
    # every model that has this mixin is a PreTrainedModel, which type checkers cannot know
    class _StockGeneration(PreTrainedModel, GenerationMixin): ...
else:
    _StockGeneration = GenerationMixin


class GenerationCompat(_StockGeneration):
    """Private steps of the stock `generate`, mended."""

    # 5.24: warns of a length beyond the positions, and then fails there
    def _prepare_generated_length(self, generation_config: GenerationConfig, **kwargs) -> GenerationConfig:
        """Return the stock lengths, but none that leads beyond the positions that the model has seen."""
        generation_config = super()._prepare_generated_length(generation_config, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        # scaled rotary embeddings are made to go beyond
        if self.config.rope_parameters["rope_type"] == "default":
            # rows of embeddings are not among the ids that are counted
            width = kwargs["inputs_tensor"].shape[1]
            is_apart = kwargs["model_input_name"] == "inputs_embeds" and kwargs["input_ids_length"] != width
            limit = self.config.max_position_embeddings - (width if is_apart else 0)
            generation_config.max_length = min(generation_config.max_length, limit)
        return generation_config

    # 5.24: generators that draft without a model draft beyond `max_length`
    def _get_candidate_generator(self, generation_config: GenerationConfig, *args, **kwargs) -> CandidateGenerator:
        """Return the stock generator of drafts, which may draft beyond the longest row by itself."""
        generator = super()._get_candidate_generator(generation_config, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        draft, longest = generator.get_candidates, generation_config.max_length

        def draft_within(input_ids: torch.LongTensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
            candidate_ids, logits = draft(input_ids, *args, **kwargs)
            # the model adds a token of its own to the drafts
            num_drafts = max(0, min(candidate_ids.shape[1], longest - 1) - input_ids.shape[1])
            candidate_ids = candidate_ids[:, : input_ids.shape[1] + num_drafts]
            return candidate_ids, None if logits is None else logits[:, :num_drafts]

        generator.get_candidates = draft_within  # pyright: ignore[reportAttributeAccessIssue]
        return generator


CARD_TAGS = ("moma", "mixture-of-experts", "early-fusion")


def prepare_saving(model: PreTrainedModel) -> None:
    """Give a model the name and the options of generation by which it is to be saved."""
    # `fully_shard` makes a class of its own, whose module and name would be saved in place of the model's
    cls, own = type(model), type(model).__bases__[-1]
    if cls.__name__.startswith("FSDP"):
        cls.__module__, cls.__name__ = own.__module__, own.__name__
    # 5.24: of options that were made of the model's configuration it reads those alone that it knows
    settings = getattr(model, "generation_config", None)
    if settings is not None and any(getattr(settings, name, None) is not None for name in OWN_OPTIONS):
        settings._from_model_config = False


def complete_model_card(path: str | Path):
    """Fill in what the author of a card left open: library, task and tags. License and data are theirs to name."""
    if not Path(path).is_file():
        return
    card = ModelCard.load(path)
    data: ModelCardData = card.data  # pyright: ignore[reportAssignmentType]
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "any-to-any"
    tags = data.tags or []
    data.tags = [*tags, *(tag for tag in CARD_TAGS if tag not in tags)]
    card.save(path)


def finish_saving(folder: str | Path) -> None:
    """Let who may read the configuration read the weights, and remove those of an earlier save of other files."""
    # safetensors 0.8 writes for the owner alone; a file system without permissions refuses, and has none to give
    with suppress(OSError):
        for path in Path(folder).glob("*.safetensors"):
            shutil.copymode(Path(folder) / CONFIG_NAME, path)
    # Transformers would load what is left of another number of files first
    whole, index = Path(folder) / SAFE_WEIGHTS_NAME, Path(folder) / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file() and index.is_file():
        # shards of an earlier save are gone by now
        shards = set(json.loads(index.read_text())["weight_map"].values())
        older = whole if all((Path(folder) / name).is_file() for name in shards) else index
        older.unlink(missing_ok=True)
