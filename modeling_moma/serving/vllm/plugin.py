# SPDX-License-Identifier: Apache-2.0
"""The entry point of vLLM's plugins: how vLLM learns of MoMa without `trust_remote_code`."""

ARCHITECTURE = "MomaForCausalLM"
MODEL_TYPE = "moma"
# the name that vLLM has for a model which its Transformers backend runs by itself
BACKEND = "TransformersForCausalLM"


def register() -> None:
    """Tell vLLM of the architecture, of its sizes and of what it needs to be served.

    vLLM calls this in each of its processes (`vllm.general_plugins` in the package's metadata). Calling it again
    changes nothing. Models of other packages are not touched.
    """
    # without vLLM pyright takes this folder for it
    from vllm import ModelRegistry  # pyright: ignore[reportAttributeAccessIssue]
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP  # pyright: ignore[reportMissingImports]
    from vllm.transformers_utils.model_arch_config_convertor import (  # pyright: ignore[reportMissingImports]
        MODEL_ARCH_CONFIG_CONVERTORS,
    )

    # the import registers the Auto classes
    from .settings import BackendConfig, MomaArchConfigConvertor, MomaServingConfig

    MODEL_ARCH_CONFIG_CONVERTORS[MODEL_TYPE] = MomaArchConfigConvertor
    MODELS_CONFIG_MAP[ARCHITECTURE] = MomaServingConfig
    MODELS_CONFIG_MAP.setdefault(BACKEND, BackendConfig)
    # given by name, the model is imported only by processes that need it
    ModelRegistry.register_model(ARCHITECTURE, "modeling_moma.serving.vllm.model:MomaForVllm")
