# SPDX-License-Identifier: Apache-2.0
"""The judge's features of pictures: a frozen network for ImageNet, of the extra `train`."""

from collections.abc import Callable, Iterable

import torch

from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork


def feature_extractor(device: str | torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    A function from pixel values `[B, 3, H, W]` in [-1, 1] to features `[B, 1280]`.

    Raises:
        ImportError: the extra `train` is not installed.
    """
    # a third faster on CPUs
    layout = torch.channels_last
    network = MomaVQPerceptualNetwork().to(device=device, memory_format=layout)  # pyright: ignore[reportCallIssue]
    return lambda pictures: network.features(pictures.to(device=device, memory_format=layout))


def all_features(extract: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Features `[N, D]` of pictures given in batches of pixel values, on the CPU."""
    return torch.cat([extract(batch).cpu() for batch in batches])
