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
"""MoMa for Transformers. Importing this package makes the Auto classes of Transformers know its two wings."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from tokenization import MomaImageProcessor, MomaImageProcessorPil, MomaProcessor, MomaVQConfig, MomaVQModel

from .auxiliary_training_moma import AuxiliaryRouterTrainer, add_auxiliary_routers, auxiliary_report
from .calibration_moma import calibrate_auxiliary_thresholds, calibrate_thresholds
from .configuration_moma import MomaConfig
from .costs_moma import eta, flops_per_token, training_flops
from .modeling_moma import MomaCausalLMOutput, MomaForCausalLM, MomaModel, MomaPreTrainedModel
from .quantization_moma import quantized_share, torchao_config
from .training_moma import MomaMetricsCallback, freeze_groups, initialize_code_embeddings
from .upcycling_moma import UpcyclingReceipt, parse_experts, upcycle, upcycled_config, upcycling_receipt


AutoConfig.register("moma", MomaConfig)
AutoConfig.register("moma_vq", MomaVQConfig)
AutoModel.register(MomaConfig, MomaModel)
AutoModel.register(MomaVQConfig, MomaVQModel)
AutoModelForCausalLM.register(MomaConfig, MomaForCausalLM)
AutoModelForImageTextToText.register(MomaConfig, MomaForCausalLM)
AutoModelForMultimodalLM.register(MomaConfig, MomaForCausalLM)
AutoImageProcessor.register(
    MomaConfig, image_processor_classes={"torchvision": MomaImageProcessor, "pil": MomaImageProcessorPil}
)
AutoProcessor.register(MomaConfig, MomaProcessor)

# what is saved then carries its code, and loads with trust_remote_code=True where this package is missing
MomaConfig.register_for_auto_class()
MomaModel.register_for_auto_class("AutoModel")
MomaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MomaProcessor.register_for_auto_class()
MomaImageProcessor.register_for_auto_class()

__all__ = [
    "AuxiliaryRouterTrainer",
    "MomaCausalLMOutput",
    "MomaConfig",
    "MomaForCausalLM",
    "MomaMetricsCallback",
    "MomaModel",
    "MomaPreTrainedModel",
    "UpcyclingReceipt",
    "add_auxiliary_routers",
    "auxiliary_report",
    "calibrate_auxiliary_thresholds",
    "calibrate_thresholds",
    "eta",
    "flops_per_token",
    "freeze_groups",
    "initialize_code_embeddings",
    "parse_experts",
    "quantized_share",
    "torchao_config",
    "training_flops",
    "upcycle",
    "upcycled_config",
    "upcycling_receipt",
]
