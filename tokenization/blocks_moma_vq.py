# SPDX-License-Identifier: Apache-2.0
"""The convolutional blocks of the image tokenizer, and its encoder and decoder."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_moma_vq import GROUP_NORM_GROUPS, MomaVQConfig
from .trunk_moma_vq import TRUNK_WIDTH, MomaVQTrunk


def make_norm(config: MomaVQConfig, channels: int) -> nn.Module:
    """Build the normalisation that `config.norm_type` names."""
    # CODEPATH: Chameleon and taming-transformers; the small configuration of moma-emoji has no norms
    if config.norm_type == "group":
        return nn.GroupNorm(num_groups=GROUP_NORM_GROUPS, num_channels=channels, eps=1e-6)
    return nn.Identity()


class MomaVQBranchEnd(nn.Conv2d):
    """The last convolution of a residual branch; initialised to zero in models without normalisation."""


class MomaVQResnetBlock(nn.Module):
    """Two 3x3 convolutions on a residual branch; a 1x1 convolution on the trunk where the width changes."""

    def __init__(self, config: MomaVQConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = make_norm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = make_norm(config, out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = MomaVQBranchEnd(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, in_channels, height, width)` to `(batch, out_channels, height, width)`."""
        branch = self.conv1(F.silu(self.norm1(hidden_states)))
        branch = self.conv2(self.dropout(F.silu(self.norm2(branch))))
        return self.nin_shortcut(hidden_states) + branch


class MomaVQAttnBlock(nn.Module):
    """Single-head attention over all positions of a feature map, on a residual branch."""

    def __init__(self, config: MomaVQConfig, channels: int):
        super().__init__()
        self.norm = make_norm(config, channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = MomaVQBranchEnd(channels, channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, channels, height, width)` to the same shape."""
        normed = self.norm(hidden_states)
        query, key, value = (projection(normed).flatten(2).transpose(1, 2) for projection in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        return hidden_states + self.proj_out(attended.transpose(1, 2).unflatten(2, hidden_states.shape[2:]))


# the parameter names of taming-transformers need this module around the convolution
class MomaVQDownsample(nn.Module):
    """A strided convolution that halves both sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, channels, side, side)` to `(batch, channels, side / 2, side / 2)`."""
        # taming-transformers pads the right and the bottom only
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


# the parameter names of taming-transformers need this module around the convolution
class MomaVQUpsample(nn.Module):
    """Nearest-neighbour upsampling that doubles both sides, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, channels, side, side)` to `(batch, channels, 2 * side, 2 * side)`."""
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class MomaVQLevel(GradientCheckpointingLayer):
    """Residual blocks, each followed by attention where the configuration asks for it; then `resize`."""

    def __init__(self, config: MomaVQConfig, in_channels: int, out_channels: int, num_blocks: int, side: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(MomaVQResnetBlock(config, *pair) for pair in pairwise(widths))
        has_attention = config.attn_type == "vanilla" and side in (config.attn_resolutions or ())
        self.attn = nn.ModuleList(
            MomaVQAttnBlock(config, out_channels) for _ in range(num_blocks if has_attention else 0)
        )

    def resize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the input, `(batch, out_channels, side, side)`: this level keeps the side."""
        return hidden_states

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, in_channels, side, side)` to `out_channels` at the side that `resize` gives."""
        for index, block in enumerate(self.block):
            hidden_states = block(hidden_states)
            if len(self.attn) > 0:
                hidden_states = self.attn[index](hidden_states)
        return self.resize(hidden_states)


class MomaVQDownLevel(MomaVQLevel):
    """A level that halves both sides of its output."""

    def __init__(self, config: MomaVQConfig, in_channels: int, out_channels: int, num_blocks: int, side: int):
        super().__init__(config, in_channels, out_channels, num_blocks, side)
        self.downsample = MomaVQDownsample(out_channels)

    def resize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Halve both sides of `(batch, out_channels, side, side)`."""
        return self.downsample(hidden_states)


class MomaVQUpLevel(MomaVQLevel):
    """A level that doubles both sides of its output."""

    def __init__(self, config: MomaVQConfig, in_channels: int, out_channels: int, num_blocks: int, side: int):
        super().__init__(config, in_channels, out_channels, num_blocks, side)
        self.upsample = MomaVQUpsample(out_channels)

    def resize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Double both sides of `(batch, out_channels, side, side)`."""
        return self.upsample(hidden_states)


class MomaVQMiddle(nn.Module):
    """The blocks at the smallest side, where attention joins all positions of the image."""

    def __init__(self, config: MomaVQConfig, channels: int):
        super().__init__()
        self.block_1 = MomaVQResnetBlock(config, channels, channels)
        # CODEPATH: None is for configurations of other libraries
        self.attn_1 = MomaVQAttnBlock(config, channels) if config.attn_type == "vanilla" else nn.Identity()
        self.block_2 = MomaVQResnetBlock(config, channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, channels, grid, grid)` to the same shape."""
        return self.block_2(self.attn_1(self.block_1(hidden_states)))


def _to_patches(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Apply `F.pixel_unshuffle`, which would leave the shape of an empty batch as it was."""
    if pixel_values.shape[0] > 0:
        return F.pixel_unshuffle(pixel_values, patch_size)
    _, channels, height, width = pixel_values.shape
    return pixel_values.reshape(0, channels * patch_size**2, height // patch_size, width // patch_size)


def _from_patches(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Apply `F.pixel_shuffle`, which has no gradient for an empty batch."""
    if patches.shape[0] > 0:
        return F.pixel_shuffle(patches, patch_size)
    _, channels, height, width = patches.shape
    return patches.reshape(0, channels // patch_size**2, height * patch_size, width * patch_size)


class MomaVQEncoder(nn.Module):
    """Images `(batch, in_channels, side, side)` to latents `(batch, latent_channels, grid, grid)`."""

    def __init__(self, config: MomaVQConfig):
        super().__init__()
        self.patch_size = config.patch_size
        widths = [config.base_channels * factor for factor in (1, *config.channel_multiplier)]
        last_level = len(config.channel_multiplier) - 1
        self.conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, widths[0], kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        for level in range(last_level + 1):
            level_class = MomaVQLevel if level == last_level else MomaVQDownLevel
            side = config.resolution // config.patch_size // 2**level
            self.down.append(level_class(config, widths[level], widths[level + 1], config.num_res_blocks, side))
        # CODEPATH: moma-emoji has the trunk, Chameleon has not
        self.trunk = MomaVQTrunk(config.downsample_factor) if config.use_trunk else None
        # CODEPATH: its features are projected only where there is a trunk
        self.trunk_proj = nn.Conv2d(TRUNK_WIDTH, widths[-1], kernel_size=1) if config.use_trunk else None
        self.mid = MomaVQMiddle(config, widths[-1])
        self.norm_out = make_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, kernel_size=3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, in_channels, side, side)` in [-1, 1] to `(batch, latent_channels, grid, grid)`."""
        hidden_states = self.conv_in(_to_patches(pixel_values, self.patch_size))
        for level in self.down:
            hidden_states = level(hidden_states)
        if self.trunk is not None and self.trunk_proj is not None:
            hidden_states = hidden_states + self.trunk_proj(self.trunk(pixel_values))
        hidden_states = self.mid(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class MomaVQDecoder(nn.Module):
    """Latents `(batch, latent_channels, grid, grid)` to images `(batch, in_channels, side, side)`."""

    def __init__(self, config: MomaVQConfig):
        super().__init__()
        self.patch_size = config.patch_size
        widths = [config.base_channels * factor for factor in config.channel_multiplier]
        # the coarsest level follows the middle blocks, which are as wide as it
        widths.append(widths[-1])
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], kernel_size=3, padding=1)
        self.mid = MomaVQMiddle(config, widths[-1])
        # level 0 is the finest, as in the encoder, so `forward` runs the levels in reverse
        self.up = nn.ModuleList()
        for level in range(len(config.channel_multiplier)):
            level_class = MomaVQLevel if level == 0 else MomaVQUpLevel
            side = config.resolution // config.patch_size // 2**level
            self.up.append(level_class(config, widths[level + 1], widths[level], config.num_res_blocks + 1, side))
        self.norm_out = make_norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels * config.patch_size**2, kernel_size=3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Map `(batch, latent_channels, grid, grid)` to `(batch, in_channels, side, side)`, not clipped."""
        hidden_states = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden_states = level(hidden_states)
        hidden_states = self.conv_out(F.silu(self.norm_out(hidden_states)))
        return _from_patches(hidden_states, self.patch_size)
