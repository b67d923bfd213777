# SPDX-License-Identifier: Apache-2.0
"""What Transformers lacks for this model and can be filled from outside its classes: entries of its tables.

Each names the version that needs it, so that a later one may drop it. Overrides of methods stay with their classes.
"""

from transformers.models.auto import modeling_auto


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
# 5.24: `transformers serve` looks here by name for what a message may hold, and registered classes are not entered
modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["moma"] = "MomaForCausalLM"  # pyright: ignore[reportArgumentType]

__all__ = ["AUTO_MAP"]
