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
"""The MoMa image tokenizer: a VQ-GAN encoder, codebook and decoder, and the losses that train them."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME, ModelOutput, auto_docstring
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .blocks_moma_vq import MomaVQBranchEnd, MomaVQDecoder, MomaVQEncoder
from .configuration_moma_vq import MomaVQConfig
from .processor_errors_moma import InputError
from .quantizer_moma_vq import MomaVQQuantizer, code_counts, mean_loss
from .trunk_moma_vq import MomaVQTrunk


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


# Pixels in one pass on a CPU: feature maps of more fall out of its caches and need newly allocated memory.
_CPU_PIXELS = 2**16


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
