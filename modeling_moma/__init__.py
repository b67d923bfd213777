# SPDX-License-Identifier: Apache-2.0
"""MoMa for Transformers. Importing this package makes the Auto classes of Transformers know its models."""

import functools
import importlib
from typing import TYPE_CHECKING, Any

from .cli.starting import starts_command
from .utils.messages import without_import_notices


if TYPE_CHECKING:
    from .calibration.auxiliary_training import AuxiliaryRouterTrainer, add_auxiliary_routers, auxiliary_report
    from .calibration.thresholds import calibrate_auxiliary_thresholds, calibrate_thresholds
    from .configuration_moma import MomaConfig
    from .export.quantization import quantized_share, torchao_config
    from .modeling_moma import MomaCausalLMOutput, MomaForCausalLM, MomaModel, MomaPreTrainedModel
    from .planning.costs import eta, flops_per_token, training_flops
    from .training.code_embeddings import initialize_code_embeddings
    from .training.freezing import freeze_all_but, freeze_groups, unfreeze
    from .training.metrics_callback import MomaMetricsCallback
    from .training.muon import Muon, muon_groups
    from .upcycling.layers import add_layers
    from .upcycling.report import UpcyclingReceipt, upcycling_receipt
    from .upcycling.upcycle import parse_experts, upcycle, upcycled_config

# module of each public name, imported when the name is first used: some import Transformers' Trainer, which imports
# PEFT and bitsandbytes where they are installed
_MODULES = {
    "AuxiliaryRouterTrainer": "calibration.auxiliary_training",
    "MomaCausalLMOutput": "modeling_moma",
    "MomaConfig": "configuration_moma",
    "MomaForCausalLM": "modeling_moma",
    "MomaMetricsCallback": "training.metrics_callback",
    "MomaModel": "modeling_moma",
    "MomaPreTrainedModel": "modeling_moma",
    "Muon": "training.muon",
    "UpcyclingReceipt": "upcycling.report",
    "add_auxiliary_routers": "calibration.auxiliary_training",
    "add_layers": "upcycling.layers",
    "auxiliary_report": "calibration.auxiliary_training",
    "calibrate_auxiliary_thresholds": "calibration.thresholds",
    "calibrate_thresholds": "calibration.thresholds",
    "eta": "planning.costs",
    "flops_per_token": "planning.costs",
    "freeze_all_but": "training.freezing",
    "freeze_groups": "training.freezing",
    "initialize_code_embeddings": "training.code_embeddings",
    "muon_groups": "training.muon",
    "parse_experts": "upcycling.upcycle",
    "quantized_share": "export.quantization",
    "torchao_config": "export.quantization",
    "training_flops": "planning.costs",
    "unfreeze": "training.freezing",
    "upcycle": "upcycling.upcycle",
    "upcycled_config": "upcycling.upcycle",
    "upcycling_receipt": "upcycling.report",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register_auto_classes()
    with without_import_notices():
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


@functools.cache
def register_auto_classes() -> None:
    """Make the Auto classes of Transformers know the model, its image tokenizer and its processor.

    Importing the package does it, but for the command `moma`: that waits until its arguments are read.
    """
    # Transformers imports torchao for its quantizers
    with without_import_notices():
        import transformers.modeling_utils  # noqa: F401
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
    from .modeling_moma import MomaForCausalLM, MomaModel

    # `exist_ok`: the package may be imported anew, or beside a Transformers with a `moma` of its own
    AutoConfig.register("moma", MomaConfig, exist_ok=True)
    AutoConfig.register("moma_vq", MomaVQConfig, exist_ok=True)
    AutoModel.register(MomaConfig, MomaModel, exist_ok=True)
    AutoModel.register(MomaVQConfig, MomaVQModel, exist_ok=True)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(MomaConfig, MomaForCausalLM, exist_ok=True)
    AutoImageProcessor.register(
        MomaConfig,
        image_processor_classes={"torchvision": MomaImageProcessor, "pil": MomaImageProcessorPil},
        exist_ok=True,
    )
    AutoProcessor.register(MomaConfig, MomaProcessor, exist_ok=True)
    # saved folders then carry their code, and load with trust_remote_code=True without this package
    MomaConfig.register_for_auto_class()
    MomaModel.register_for_auto_class("AutoModel")
    MomaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    MomaProcessor.register_for_auto_class()
    MomaImageProcessor.register_for_auto_class()


if not starts_command():
    register_auto_classes()

__all__ = [
    "AuxiliaryRouterTrainer",
    "MomaCausalLMOutput",
    "MomaConfig",
    "MomaForCausalLM",
    "MomaMetricsCallback",
    "MomaModel",
    "MomaPreTrainedModel",
    "Muon",
    "UpcyclingReceipt",
    "add_auxiliary_routers",
    "add_layers",
    "auxiliary_report",
    "calibrate_auxiliary_thresholds",
    "calibrate_thresholds",
    "eta",
    "flops_per_token",
    "freeze_all_but",
    "freeze_groups",
    "initialize_code_embeddings",
    "muon_groups",
    "parse_experts",
    "quantized_share",
    "torchao_config",
    "training_flops",
    "unfreeze",
    "upcycle",
    "upcycled_config",
    "upcycling_receipt",
]
