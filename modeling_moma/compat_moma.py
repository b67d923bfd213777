# SPDX-License-Identifier: Apache-2.0
"""What Transformers lacks for this model: entries of its tables, the card that it writes.

Each names the version that needs it, so that a later one may drop it.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
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

# 5.24: Trainer looks here by name for the labels that it smooths, and registered classes are not entered; under FSDP2
# torch gives the model's class another name
_NAMES: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_NAMES.update({"moma": "MomaForCausalLM", "moma_fsdp": "FSDPMomaForCausalLM"})

# generation options of this model that GenerationConfig does not know
OWN_OPTIONS = ("generation_mode", "caption_suppress_tokens", "image_sampling")


CARD_TAGS = ("moma", "mixture-of-experts", "early-fusion")


def prepare_saving(model: PreTrainedModel) -> None:
    """Give a model the name and the options of generation by which it is to be saved."""
    # `fully_shard` makes a class of its own, whose module and name would be saved in place of the model's
    cls, own = type(model), type(model).__bases__[-1]
    if cls.__name__.startswith("FSDP"):
        cls.__module__, cls.__name__ = own.__module__, own.__name__
    # 5.24: a generation configuration derived from the model's configuration loses options that Transformers lacks
    settings = getattr(model, "generation_config", None)
    if settings is not None and any(getattr(settings, name, None) is not None for name in OWN_OPTIONS):
        settings._from_model_config = False


def complete_model_card(path: str | Path):
    """Fill in what the author of a card left open: library, task and tags. License and data are theirs to name."""
    if not Path(path).is_file():
        return
    card = ModelCard.load(path)
    data: Any = card.data
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
    # a single file and an index may both be left after saving with another number of shards; loaders would take the
    # single file, so the older of the two is removed
    whole, index = Path(folder) / SAFE_WEIGHTS_NAME, Path(folder) / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file() and index.is_file():
        # save_pretrained has removed shards of earlier saves, so an index whose shards are missing is the older one
        shards = set(json.loads(index.read_text())["weight_map"].values())
        older = whole if all((Path(folder) / name).is_file() for name in shards) else index
        older.unlink(missing_ok=True)
