# SPDX-License-Identifier: Apache-2.0
"""MoMa for Transformers. Importing this package makes the Auto classes of Transformers know its two wings."""

from .tools.import_notices import without_import_notices


# Transformers imports torchao for its quantizers and, for its Trainer, PEFT and with that bitsandbytes
with without_import_notices():
    import transformers.trainer  # noqa: F401

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

from .configuration_moma import MomaConfig
from .modeling_moma import MomaCausalLMOutput, MomaForCausalLM, MomaModel, MomaPreTrainedModel
from .tools.auxiliary_training import AuxiliaryRouterTrainer, add_auxiliary_routers, auxiliary_report
from .tools.calibration import calibrate_auxiliary_thresholds, calibrate_thresholds
from .tools.callbacks import MomaMetricsCallback
from .tools.code_embeddings import initialize_code_embeddings
from .tools.costs import eta, flops_per_token, training_flops
from .tools.freezing import freeze_all_but, freeze_groups
from .tools.quantization import quantized_share, torchao_config
from .tools.upcycling import parse_experts, upcycle, upcycled_config
from .tools.upcycling_receipt import UpcyclingReceipt, upcycling_receipt


# `exist_ok`: the package may be imported anew, or beside a Transformers with a `moma` of its own
AutoConfig.register("moma", MomaConfig, exist_ok=True)
AutoConfig.register("moma_vq", MomaVQConfig, exist_ok=True)
AutoModel.register(MomaConfig, MomaModel, exist_ok=True)
AutoModel.register(MomaVQConfig, MomaVQModel, exist_ok=True)
for _auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(MomaConfig, MomaForCausalLM, exist_ok=True)
AutoImageProcessor.register(
    MomaConfig,
    image_processor_classes={"torchvision": MomaImageProcessor, "pil": MomaImageProcessorPil},
    exist_ok=True,
)
AutoProcessor.register(MomaConfig, MomaProcessor, exist_ok=True)

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
    "freeze_all_but",
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
