# SPDX-License-Identifier: Apache-2.0
"""What vLLM reads of a MoMa's configuration, what it has to set for one, and what it cannot run."""

import os
from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig  # pyright: ignore[reportMissingImports]
from vllm.transformers_utils.model_arch_config_convertor import (  # pyright: ignore[reportMissingImports]
    ModelArchConfigConvertorBase,
)

from ...configuration_moma import MomaConfig
from ...errors_moma import InputError
from .grammar import SERVED_MODES, FrameGrammar


GRAMMAR = "modeling_moma.serving.vllm.logits_processor:MomaLogitsProcessor"
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


class MomaArchConfigConvertor(ModelArchConfigConvertorBase):
    """Sizes of a MoMa. vLLM asks for one number of experts, and would put its own in the place of those it counts."""

    def get_num_experts(self) -> int:
        """Return 0, since routing and experts are those of the package."""
        return 0

    def get_num_experts_per_token(self) -> int:
        """See [`get_num_experts`]."""
        return 0


class MomaServingConfig(VerifyAndUpdateConfig):
    """What vLLM calls for a MoMa before it loads one."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Raise for what cannot run, and put the grammar and eager execution in."""
        config = model_config.hf_config
        check_servable(config)
        if model_config.enable_prompt_embeds:
            raise InputError(
                "`enable_prompt_embeds` cannot be used with a MoMa: the ids of a prompt tell which experts serve it, "
                "and embeddings have none. Send token ids."
            )
        if os.environ.setdefault(RUNNER, "0") != "0":
            raise InputError(
                f"{RUNNER}={os.environ[RUNNER]}: the grammar of a MoMa is written for vLLM's first model runner. "
                "Unset the variable."
            )
        # tokens are counted by modality and by expert in every step, so shapes depend on them
        model_config.enforce_eager = True
        processors = model_config.logits_processors or []
        if GRAMMAR not in processors:
            model_config.logits_processors = [*processors, GRAMMAR]
        SERVED_MODES.update(FrameGrammar.modes(config))

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raise for pipeline parallelism."""
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages > 1:
            raise InputError(
                f"`pipeline_parallel_size` is {stages}, but a MoMa needs 1: later stages get no token ids, which tell "
                "which experts serve a token."
            )


class BackendConfig(VerifyAndUpdateConfig):
    """What vLLM calls for models of any package that its Transformers backend shall run by itself."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Raise for a MoMa, whose grammar and images this backend alone does not know; other models pass."""
        # compared by name, as a folder with its own code has a configuration class of its own
        if getattr(model_config.hf_config, "model_type", None) == MomaConfig.model_type:
            raise InputError(
                f"`model_impl` is {model_config.model_impl!r}, but vLLM's backend alone passes over the "
                "`generation_mode` of a MoMa, its images and what vLLM cannot run of it. Leave `model_impl` out."
            )


def check_servable(config: MomaConfig) -> None:
    """Check that vLLM can run a model of this configuration."""
    if config.depth_layers:
        raise InputError(
            f"vLLM cannot serve a MoMa with mixture of depths: `depth_layers` is {config.depth_layers}, and in those "
            "layers each row has keys of its own chosen tokens alone, while vLLM's paged cache has a place for every "
            "token in every layer. Use `generate` or `moma serve`."
        )
    if config.untied_attention:
        raise InputError(
            "vLLM cannot serve a MoMa with attention by modality: `untied_attention` is True, and vLLM's own matrices "
            "and norms, which it puts in the place of a layer's, have not been tried on a modality without a token. "
            "Use `generate` or `moma serve`."
        )
