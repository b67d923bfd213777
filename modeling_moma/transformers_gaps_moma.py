# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["moma"] = "MomaForCausalLM"
# 5.24: `transformers serve` looks here by name for what a message may hold, and registered classes are not entered
modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["moma"] = "MomaForCausalLM"

__all__ = ["AUTO_MAP"]
