# SPDX-License-Identifier: Apache-2.0
"""What of a MoMa is quantised, and the torchao configuration that takes the packed experts in."""

from transformers import PreTrainedModel, TorchAoConfig

from ..utils.errors import needs_extra


# full names of parameters: a pattern of module names would quantise their biases, too
LINEAR_LAYERS = (
    r".*\.self_attn\.(.+\.)?[qkvo]_proj\.weight",
    r".*\.(mlp|shared_expert)\.(gate|up|down)_proj\.weight",
)
PACKED_EXPERTS = (r".*\.experts\.(gate_up|down)_proj",)


def torchao_config(linear_config, expert_config=None) -> TorchAoConfig:
    """Return a torchao configuration for attention, feed-forward layers and packed experts.

    By itself torchao takes `nn.Linear` alone, and packed experts are bare parameters. Biases, embedding, head, norms,
    routers and thresholds keep their type.

    Args:
        linear_config (`AOBaseConfig`):
            For the `nn.Linear` layers, as `torchao.quantization.Int8WeightOnlyConfig()`.
        expert_config (`AOBaseConfig`, *optional*):
            For the packed experts; has to be one that knows parameters of three dimensions, as the int8 ones do.

    Returns:
        `TorchAoConfig`: the `quantization_config` of `from_pretrained`.

    Raises:
        ImportError: torchao is not installed.
        TypeError: an argument is not a torchao configuration.

    Example:
    ```python
    >>> from torchao.quantization import Int8WeightOnlyConfig
    >>> from modeling_moma import MomaForCausalLM, torchao_config

    >>> model = MomaForCausalLM.from_pretrained(
    ...     "model_cards/moma-emoji", quantization_config=torchao_config(Int8WeightOnlyConfig())
    ... )
    ```
    """
    with needs_extra("`torchao_config` needs torchao", "quantize"):
        from torchao.core.config import AOBaseConfig
        from torchao.quantization import FqnToConfig
    expert_config = linear_config if expert_config is None else expert_config
    for name, value in (("linear_config", linear_config), ("expert_config", expert_config)):
        if not isinstance(value, AOBaseConfig):
            raise TypeError(
                f"`{name}` must be a configuration of torchao, as Int8WeightOnlyConfig(), got {type(value).__name__}."
            )
    configs = {f"re:{pattern}": linear_config for pattern in LINEAR_LAYERS}
    configs |= {f"re:{pattern}": expert_config for pattern in PACKED_EXPERTS}
    return TorchAoConfig(FqnToConfig(configs))  # pyright: ignore[reportArgumentType]


def quantized_share(model: PreTrainedModel) -> float:
    """Share of a model's weights, tied ones counted once, that is quantised.

    Args:
        model (`PreTrainedModel`):
            quantised by torchao or bitsandbytes, or not at all.

    Returns:
        `float`: between 0 and 1.
    """
    total = quantized = 0
    for parameter in model.parameters():
        # bitsandbytes packs two 4-bit weights into a byte, and keeps the shape that the weight had
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        total += count
        # torchao's tensors report the dtype from before quantisation, so they are known by `qdata`
        if hasattr(parameter, "qdata") or not parameter.is_floating_point():
            quantized += count
    return quantized / total
