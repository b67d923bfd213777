# SPDX-License-Identifier: Apache-2.0
"""A discriminator of patches that an image tokenizer is trained against, as VQGAN (arXiv 2012.09841) is."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenization.modeling_moma_vq import MomaVQModel, MomaVQOutput

from ..errors_moma import InputError


# sizes of pix2pix (arXiv 1611.07004): strided layers, width of the first, slope, deviation of fresh weights
NUM_LAYERS, BASE_WIDTH, SLOPE, INITIAL_STD = 3, 64, 0.2, 0.02
# layers beyond it are no wider, in units of the first one's width
LARGEST_FACTOR = 8
# smallest image of which the layers leave a verdict
SMALLEST_SIDE = 24
LEARNING_RATE, BETAS = 2e-4, (0.5, 0.9)
# the adaptive weight before `weight`, and what keeps its quotient finite
LARGEST_RATIO, SMALL = 1e4, 1e-4


class PatchDiscriminator(nn.Module):
    """Images `(batch, channels, side, side)` to one verdict for each patch of 70 pixels, above 0 for real ones.

    Args:
        channels (`int`, *optional*, defaults to `3`):
            of the images.
    """

    def __init__(self, channels: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, BASE_WIDTH, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        width = BASE_WIDTH
        for layer in range(1, NUM_LAYERS + 1):
            wider = BASE_WIDTH * min(2**layer, LARGEST_FACTOR)
            # the last one before the verdict keeps the side
            stride = 2 if layer < NUM_LAYERS else 1
            # the norm has a shift of its own
            convolution = nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(wider), nn.LeakyReLU(SLOPE)]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, INITIAL_STD)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, INITIAL_STD)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(batch, channels, side, side)` to `(batch, 1, rows, columns)` verdicts."""
        return self.layers(pixel_values)


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Return the discriminator's loss: 0 where real patches score above 1 and reconstructed ones below -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


class AdversarialTraining:
    """A discriminator and its optimizer, and the term that it adds to an image tokenizer's loss.

    Args:
        weight (`float`):
            of the term, before the adaptive weight.
        start (`int`):
            first step of discriminator and term, counted from 0; before it nothing of them is computed.
        config (`Any`):
            of the image tokenizer.
        seed (`int`):
            of the fresh weights.
        device (`torch.device`):
            of the image tokenizer.

    Raises:
        ValueError: the images are too small.
    """

    def __init__(self, weight: float, start: int, config: Any, seed: int, device: torch.device):
        if config.resolution < SMALLEST_SIDE:
            raise InputError(
                f"adversarial_weight={weight}: images of {config.resolution} pixels a side are too small for the "
                f"discriminator, which needs {SMALLEST_SIDE}."
            )
        self.weight, self.start = weight, start
        # the model's random numbers stay what they are without it
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.discriminator = PatchDiscriminator(config.in_channels)
        self.discriminator = self.discriminator.to(device).train()
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=LEARNING_RATE, betas=BETAS)

    def is_on(self, step: int) -> bool:
        """Return whether a step has the term."""
        return step >= self.start

    def term(self, model: MomaVQModel, output: MomaVQOutput) -> tuple[torch.Tensor, float]:
        """Return the term of the tokenizer's loss: reconstructions shall be taken for real.

        Args:
            model (`MomaVQModel`):
                has a decoder.
            output (`MomaVQOutput`):
                of its forward pass with gradients.

        Returns:
            `tuple[torch.Tensor, float]`: the term, its weights included, and the loss without them. The adaptive
            weight makes its gradient at the decoder's last layer as large as that of the terms which compare images.
        """
        self.discriminator.requires_grad_(False)
        loss = -self.discriminator(output.reconstruction).mean()
        self.discriminator.requires_grad_(True)
        compared: Any = output.reconstruction_loss
        if output.perceptual_loss is not None:
            compared = compared + model.config.perceptual_weight * output.perceptual_loss
        decoder: Any = model.decoder
        last = decoder.conv_out.weight
        (wanted,), (found,) = (torch.autograd.grad(value, last, retain_graph=True) for value in (compared, loss))
        ratio = (wanted.norm() / (found.norm() + SMALL)).clamp(max=LARGEST_RATIO)
        return self.weight * ratio * loss, loss.item()

    def train_step(self, real: torch.Tensor, fake: torch.Tensor) -> float:
        """Take one step of the discriminator.

        Args:
            real (`torch.Tensor`):
                images `(batch, channels, side, side)`.
            fake (`torch.Tensor`):
                their reconstructions, without gradient.

        Returns:
            `float`: its loss.
        """
        loss = hinge_loss(self.discriminator(real), self.discriminator(fake.detach()))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs."""
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from [`AdversarialTraining.state_dict`]."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
