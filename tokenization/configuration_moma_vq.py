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
"""Configuration of the MoMa image tokenizer."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring

from .processor_errors_moma import InputError


# The number of groups in taming-transformers and Chameleon, which is in neither configuration.
GROUP_NORM_GROUPS = 32

# Small enough to train on a CPU: patches of pixels are folded into channels, and there are no norms.
_SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "num_embeddings": 1024,
    "latent_channels": 128,
    "resolution": 64,
    "base_channels": 64,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "patch_size": 4,
    "norm_type": "none",
    "codebook_decay": 0.98,
    "use_trunk": True,
    "semantic_dim": 1280,
    "semantic_weight": 0.5,
}
# More codes than "small": photos hold more kinds of patches than drawings.
_MEDIUM = {**_SMALL, "resolution": 256, "num_embeddings": 4096}

PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": _SMALL,
    "medium-256": {**_MEDIUM, "channel_multiplier": [1, 2, 2]},
    "medium-1024": _MEDIUM,
}
# fields that are at least 1, and at least 0
_SIZES = (
    *("embed_dim", "num_embeddings", "latent_channels", "resolution", "in_channels", "base_channels"),
    *("num_res_blocks", "patch_size", "semantic_hidden_size"),
)
_WEIGHTS = ("beta", "revive_threshold", "l1_weight", "l2_weight", "perceptual_weight", "semantic_weight")


@auto_docstring(checkpoint="moma-emoji")
@strict
class MomaVQConfig(PreTrainedConfig):
    r"""
    embed_dim (`int`, *optional*, defaults to 256):
        Width of one codebook vector.
    num_embeddings (`int`, *optional*, defaults to 8192):
        Number of codes (the paper, section 2.1: 8,192 codes of the Chameleon image tokenizer).
    double_latent (`bool`, *optional*, defaults to `False`):
        Kept for configurations of other libraries. A vector quantiser has no variance half, so only `False` is valid.
    latent_channels (`int`, *optional*, defaults to 256):
        Channels between the encoder (or decoder) and the 1x1 convolutions around the codebook.
    resolution (`int`, *optional*, defaults to 512):
        Side of the images in pixels. Other sides work too, as long as `downsample_factor` divides them.
    in_channels (`int`, *optional*, defaults to 3):
        Colour channels of an image.
    base_channels (`int`, *optional*, defaults to 128):
        Channels after the first convolution.
    channel_multiplier (`list[int]`, *optional*, defaults to `(1, 1, 2, 2, 4)`):
        Channels of each level, in units of `base_channels`. Between two levels the side is halved.
    num_res_blocks (`int`, *optional*, defaults to 2):
        Residual blocks of each encoder level; a decoder level has one more.
    attn_resolutions (`list[int]`, *optional*):
        Sides (in pixels of the feature map at `resolution`) at which each residual block is followed by attention.
    dropout (`float`, *optional*, defaults to 0.0):
        Dropout rate inside the residual blocks.
    attn_type (`str`, *optional*, defaults to `"vanilla"`):
        `"vanilla"` puts attention in the middle of encoder and decoder, `None` leaves all attention out.
    patch_size (`int`, *optional*, defaults to 1):
        Side of the squares folded into channels before the first convolution (space to depth) and unfolded after the
        last one (pixel shuffle). 1 is the layout of taming-transformers and Chameleon.
    norm_type (`str`, *optional*, defaults to `"group"`):
        `"group"` for group normalisation, `"none"` for no normalisation; then the last convolution of each residual
        branch starts at zero, so that training begins from the identity.
    beta (`float`, *optional*, defaults to 0.25):
        With `codebook_decay`: weight of the commitment term. Without: weight of the codebook term, as in Chameleon.
    codebook_decay (`float`, *optional*):
        Decay of the moving averages that the codebook follows. `None` trains the codebook by gradient.
    revive_threshold (`float`, *optional*, defaults to 0.1):
        A code used less often than this (moving average of uses per batch) is replaced by a latent of the batch.
    use_decoder (`bool`, *optional*, defaults to `True`):
        Whether there is a decoder. Chameleon's checkpoints have none: such a tokenizer reads images, but shows none.
    use_trunk (`bool`, *optional*, defaults to `False`):
        Whether the encoder also sees the frozen features of an EfficientNet-Lite0 trained on ImageNet, about 0.7
        million parameters: codes can then carry what an image shows, not only how it looks.
    semantic_dim (`int`, *optional*):
        Width of the feature vector that the codes of an image have to predict together. `None`: no such head.
    semantic_hidden_size (`int`, *optional*, defaults to 256):
        Hidden width of that head.
    l1_weight (`float`, *optional*, defaults to 1.0):
        Weight of the mean absolute error of the pixels.
    l2_weight (`float`, *optional*, defaults to 2.0):
        Weight of the mean squared error of the pixels.
    perceptual_weight (`float`, *optional*, defaults to 0.0):
        Weight of the perceptual distance, which the caller hands to `forward`.
    semantic_weight (`float`, *optional*, defaults to 0.1):
        Weight of the semantic loss, used when `forward` gets `semantic_targets`.

    ```python
    >>> from tokenization import MomaVQConfig, MomaVQModel

    >>> config = MomaVQConfig.from_preset("small")
    >>> model = MomaVQModel(config)
    >>> config.downsample_factor
    8
    ```
    """

    model_type = "moma_vq"
    base_config_key = "vq_config"

    embed_dim: int = 256
    num_embeddings: int = 8192
    double_latent: bool = False
    latent_channels: int = 256
    resolution: int = 512
    in_channels: int = 3
    base_channels: int = 128
    channel_multiplier: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: list[int] | tuple[int, ...] | None = None
    dropout: float | int = 0.0
    attn_type: str | None = "vanilla"
    patch_size: int = 1
    norm_type: str = "group"
    beta: float | int = 0.25
    codebook_decay: float | None = None
    revive_threshold: float | int = 0.1
    use_decoder: bool = True
    use_trunk: bool = False
    semantic_dim: int | None = None
    semantic_hidden_size: int = 256
    l1_weight: float | int = 1.0
    l2_weight: float | int = 2.0
    perceptual_weight: float | int = 0.0
    semantic_weight: float | int = 0.1

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "MomaVQConfig":
        r"""Build a named configuration.

        Args:
            name (`str`):
                `"full"`: Chameleon's tokenizer, 512x512 pixels to 1,024 tokens of 8,192 codes. `"small"`: 64x64 pixels
                to 64 tokens of 1,024 codes, about 3.3 million parameters, trainable on a CPU. `"medium-256"` and
                `"medium-1024"`: 256x256 pixels to 256 or 1,024 tokens of 4,096 codes, likewise.
            overrides (`Any`):
                Fields that replace those of the preset.

        Returns:
            [`MomaVQConfig`]: the configuration.

        Raises:
            ValueError: `name` is not a preset, or a field is invalid.
        """
        if name not in PRESETS:
            raise InputError(f"name={name!r} is no preset of MomaVQConfig; the presets are {sorted(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def downsample_factor(self) -> int:
        """Pixels per token along one side."""
        return self.patch_size * 2 ** (len(self.channel_multiplier) - 1)

    def validate_architecture(self):
        """Raise `ValueError`, with the field's name, for values from which no model can be built."""
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in _WEIGHTS:
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must not be negative.")
        if self.semantic_dim is not None and self.semantic_dim < 1:
            raise InputError(f"semantic_dim={self.semantic_dim} must be at least 1, or None for no semantic head.")
        if len(self.channel_multiplier) == 0 or min(self.channel_multiplier) < 1:
            raise InputError(
                f"channel_multiplier={self.channel_multiplier} must hold one factor of at least 1 per level."
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout} must lie in [0, 1).")
        if self.codebook_decay is not None and not 0 < self.codebook_decay < 1:
            raise InputError(
                f"codebook_decay={self.codebook_decay} must lie in (0, 1); None trains the codebook by gradient."
            )
        if self.double_latent:
            raise InputError("double_latent=True: a vector quantiser has no variance half; use double_latent=False.")
        if self.attn_type not in ("vanilla", None):
            raise InputError(f"attn_type={self.attn_type!r} is unknown; use 'vanilla' or None.")
        if self.norm_type not in ("group", "none"):
            raise InputError(f"norm_type={self.norm_type!r} is unknown; use 'group' or 'none'.")
        if self.norm_type == "group" and self.base_channels % GROUP_NORM_GROUPS != 0:
            raise InputError(
                f"base_channels={self.base_channels} must be a multiple of {GROUP_NORM_GROUPS} with norm_type='group'."
            )
        if self.use_trunk and self.in_channels != 3:
            raise InputError(
                f"use_trunk=True needs in_channels=3, got {self.in_channels}: the trunk was trained on RGB images."
            )
        if self.resolution % self.downsample_factor != 0:
            raise InputError(
                f"resolution={self.resolution} must be a multiple of {self.downsample_factor}, that is patch_size="
                f"{self.patch_size} times 2 for each step between the {len(self.channel_multiplier)} levels of "
                "channel_multiplier."
            )


__all__ = ["MomaVQConfig"]
