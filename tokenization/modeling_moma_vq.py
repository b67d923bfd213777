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
"""The MoMa picture tokenizer: a VQ-GAN encoder, codebook and decoder, and the losses that train them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, auto_docstring
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .configuration_moma_vq import GROUP_NORM_GROUPS, MomaVQConfig
from .trunk_moma_vq import TRUNK_WIDTH, MomaVQTrunk


# latents compared with the codebook at a time
ASSIGN_PIECE = 512


@auto_docstring(custom_intro="What one pass of [`MomaVQModel`] over a batch of pictures gives.")
@dataclass
class MomaVQOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`):
        Weighted sum of the losses below.
    reconstruction_loss (`torch.FloatTensor` of shape `()`):
        `l1_weight` times the mean absolute error plus `l2_weight` times the mean squared error of the pixels.
    commitment_loss (`torch.FloatTensor` of shape `()`):
        Distance between the latents and their codes, `beta` included.
    semantic_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Before its weight; only with `semantic_targets`.
    perceptual_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Before its weight; only with `perceptual_distance`.
    reconstruction (`torch.FloatTensor` of shape `(batch_size, in_channels, height, width)`):
        The decoded pictures, not clipped to [-1, 1].
    image_tokens (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
        The codes in raster order.
    latents (`torch.FloatTensor` of shape `(batch_size, embed_dim, grid, grid)`):
        The vectors before quantisation, for [`~MomaVQModel.update_codebook`].
    semantic_prediction (`torch.FloatTensor` of shape `(batch_size, semantic_dim)`, *optional*):
        What the codes say about the picture; only in models with a semantic head.
    codebook_usage (`torch.FloatTensor` of shape `()`):
        Perplexity of the codes in this batch: 1 (a single code) to `num_embeddings` (all alike).
    """

    loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    semantic_loss: torch.FloatTensor | None = None
    perceptual_loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    image_tokens: torch.LongTensor | None = None
    latents: torch.FloatTensor | None = None
    semantic_prediction: torch.FloatTensor | None = None
    codebook_usage: torch.FloatTensor | None = None


def make_norm(config: MomaVQConfig, channels: int) -> nn.Module:
    """The normalisation of `config.norm_type` over `channels` channels."""
    # CODEPATH: Chameleon and taming-transformers; the small configuration of moma-emoji has no norms
    if config.norm_type == "group":
        return nn.GroupNorm(num_groups=GROUP_NORM_GROUPS, num_channels=channels, eps=1e-6)
    return nn.Identity()


class MomaVQBranchEnd(nn.Conv2d):
    """The last convolution of a residual branch. It starts at zero in models without normalisation."""


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
        normed = self.norm(hidden_states)
        query, key, value = (projection(normed).flatten(2).transpose(1, 2) for projection in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        return hidden_states + self.proj_out(attended.transpose(1, 2).unflatten(2, hidden_states.shape[2:]))


# trf-ignore: TRF026, the parameter names of taming-transformers need this level
class MomaVQDownsample(nn.Module):
    """Halves both sides by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # taming-transformers pads the right and the bottom only
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


# trf-ignore: TRF026, the parameter names of taming-transformers need this level
class MomaVQUpsample(nn.Module):
    """Doubles both sides by repetition, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class MomaVQLevel(GradientCheckpointingLayer):
    """Residual blocks (each followed by attention where the configuration asks for it), then a change of the side."""

    def __init__(self, config: MomaVQConfig, in_channels: int, out_channels: int, num_blocks: int, side: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(MomaVQResnetBlock(config, *pair) for pair in pairwise(widths))
        has_attention = config.attn_type == "vanilla" and side in (config.attn_resolutions or ())
        self.attn = nn.ModuleList(
            MomaVQAttnBlock(config, out_channels) for _ in range(num_blocks if has_attention else 0)
        )

    def resize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.block):
            hidden_states = block(hidden_states)
            if len(self.attn) > 0:
                hidden_states = self.attn[index](hidden_states)
        return self.resize(hidden_states)


class MomaVQDownLevel(MomaVQLevel):
    """A level whose result is halved."""

    def __init__(self, config: MomaVQConfig, in_channels: int, out_channels: int, num_blocks: int, side: int):
        super().__init__(config, in_channels, out_channels, num_blocks, side)
        self.downsample = MomaVQDownsample(out_channels)

    def resize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.downsample(hidden_states)


class MomaVQUpLevel(MomaVQLevel):
    """A level whose result is doubled."""

    def __init__(self, config: MomaVQConfig, in_channels: int, out_channels: int, num_blocks: int, side: int):
        super().__init__(config, in_channels, out_channels, num_blocks, side)
        self.upsample = MomaVQUpsample(out_channels)

    def resize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.upsample(hidden_states)


class MomaVQMiddle(nn.Module):
    """The blocks at the smallest side, where attention lets each position see the whole picture."""

    def __init__(self, config: MomaVQConfig, channels: int):
        super().__init__()
        self.block_1 = MomaVQResnetBlock(config, channels, channels)
        # CODEPATH: None is for configurations of other libraries
        self.attn_1 = MomaVQAttnBlock(config, channels) if config.attn_type == "vanilla" else nn.Identity()
        self.block_2 = MomaVQResnetBlock(config, channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden_states)))


class MomaVQEncoder(nn.Module):
    """Pictures `(batch, in_channels, side, side)` to latents `(batch, latent_channels, grid, grid)`."""

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
        # CODEPATH: as above
        self.trunk_proj = nn.Conv2d(TRUNK_WIDTH, widths[-1], kernel_size=1) if config.use_trunk else None
        self.mid = MomaVQMiddle(config, widths[-1])
        self.norm_out = make_norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, kernel_size=3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(F.pixel_unshuffle(pixel_values, self.patch_size))
        for level in self.down:
            hidden_states = level(hidden_states)
        if self.trunk is not None:
            hidden_states = hidden_states + self.trunk_proj(self.trunk(pixel_values))
        hidden_states = self.mid(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class MomaVQDecoder(nn.Module):
    """Latents `(batch, latent_channels, grid, grid)` to pictures `(batch, in_channels, side, side)`."""

    def __init__(self, config: MomaVQConfig):
        super().__init__()
        self.patch_size = config.patch_size
        widths = [config.base_channels * factor for factor in config.channel_multiplier]
        # the level below the lowest one is the middle, as wide as the lowest
        widths.append(widths[-1])
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], kernel_size=3, padding=1)
        self.mid = MomaVQMiddle(config, widths[-1])
        # level 0 is the finest, as in the encoder, so the levels run from the last to the first
        self.up = nn.ModuleList()
        for level in range(len(config.channel_multiplier)):
            level_class = MomaVQLevel if level == 0 else MomaVQUpLevel
            side = config.resolution // config.patch_size // 2**level
            self.up.append(level_class(config, widths[level + 1], widths[level], config.num_res_blocks + 1, side))
        self.norm_out = make_norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.in_channels * config.patch_size**2, kernel_size=3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden_states = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            hidden_states = level(hidden_states)
        hidden_states = self.conv_out(F.silu(self.norm_out(hidden_states)))
        return F.pixel_shuffle(hidden_states, self.patch_size)


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
        """The nearest code of each of `(n, embed_dim)` float32 vectors, as `(n,)` ids."""
        with maybe_autocast(vectors.device.type, enabled=False):
            codebook = self.embedding.weight.detach().float()
            code_lengths = codebook.pow(2).sum(dim=1)
            nearest = []
            # in pieces, so that the distances stay in the processor's cache
            for piece in vectors.split(ASSIGN_PIECE):
                # Chameleon's order of operations, so that near ties round to the same code
                distances = piece.pow(2).sum(dim=1, keepdim=True) + code_lengths
                nearest.append(distances.sub_(piece @ codebook.T, alpha=2).argmin(dim=1))
            return torch.cat(nearest)

    def lookup(self, image_tokens: torch.Tensor, grid: int) -> torch.Tensor:
        """Codes `(batch, grid * grid)` to float32 vectors `(batch, embed_dim, grid, grid)`."""
        return self.embedding(image_tokens).float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents `(batch, embed_dim, grid, grid)` to quantised latents, the loss, codes `(batch, grid * grid)`."""
        latents = latents.float()
        vectors = latents.permute(0, 2, 3, 1).flatten(0, 2)
        image_tokens = self.assign(vectors.detach()).view(latents.shape[0], -1)
        codes = self.lookup(image_tokens, latents.shape[-1])
        commitment = F.mse_loss(latents, codes.detach())
        if self.decay is None:
            loss = commitment + self.beta * F.mse_loss(codes, latents.detach())
        else:
            loss = self.beta * commitment
        # straight-through: the gradient of the quantised latents is that of the latents
        return latents + (codes - latents).detach(), loss, image_tokens

    def update(self, vectors: torch.Tensor, image_tokens: torch.Tensor) -> None:
        """Move the averages towards `(n, embed_dim)` vectors and their `(n,)` codes, and revive dead codes."""
        counts = torch.bincount(image_tokens, minlength=self.ema_count.shape[0]).to(self.ema_count.dtype)
        sums = torch.zeros_like(self.ema_sum).index_add_(0, image_tokens, vectors.to(self.ema_sum.dtype))
        self.ema_count.lerp_(counts, 1 - self.decay)
        self.ema_sum.lerp_(sums, 1 - self.decay)
        dead = self.ema_count < self.revive_threshold
        picked = torch.randint(vectors.shape[0], dead.shape, device=vectors.device)
        self.ema_count.masked_fill_(dead, 1.0)
        self.ema_sum.copy_(torch.where(dead[:, None], vectors[picked].to(self.ema_sum.dtype), self.ema_sum))
        # what has not been used for hundreds of batches, and is not to be revived, stays what it was
        is_known = (self.ema_count > torch.finfo(self.ema_count.dtype).tiny)[:, None]
        means = self.ema_sum / self.ema_count[:, None]
        self.embedding.weight.copy_(torch.where(is_known, means, self.embedding.weight))

    def fit(self, vectors: torch.Tensor, iterations: int) -> None:
        """Set the codebook to the k-means centres of `(n, embed_dim)` vectors, and restart the averages there."""
        num_codes, count = self.embedding.weight.shape[0], vectors.shape[0]
        order = torch.randperm(count, device=vectors.device)
        # fewer vectors than codes: some codes start alike, and revival separates them
        self.embedding.weight.copy_(vectors[order[torch.arange(num_codes, device=vectors.device) % count]])
        for _ in range(iterations):
            assigned = self.assign(vectors)
            sizes = torch.bincount(assigned, minlength=num_codes)[:, None]
            sums = torch.zeros_like(self.embedding.weight).index_add_(0, assigned, vectors)
            self.embedding.weight.copy_(torch.where(sizes > 0, sums / sizes.clamp(min=1), self.embedding.weight))
        if self.decay is not None:
            self.ema_count.fill_(1.0)
            self.ema_sum.copy_(self.embedding.weight)


class MomaVQSemanticHead(nn.Module):
    """Predicts a feature vector of the picture from the mean over positions of a small function of each code."""

    def __init__(self, config: MomaVQConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.semantic_hidden_size)
        self.fc2 = nn.Linear(config.semantic_hidden_size, config.semantic_dim)

    def forward(self, quantized: torch.Tensor) -> torch.Tensor:
        hidden_states = F.gelu(self.fc1(quantized.flatten(2).transpose(1, 2)))
        # the second layer is linear, so the mean may be taken before it
        return self.fc2(hidden_states.mean(dim=1))


@auto_docstring(
    custom_intro="""
    The picture tokenizer: pictures to codes and back. The parameter names are those of taming-transformers and of
    Chameleon, whose encoder weights load by name into the default configuration.
    """
)
class MomaVQModel(PreTrainedModel):
    config: MomaVQConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
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

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in Transformers. Loading makes new parameters, which all ask for gradients, so it freezes them again."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze()
        return loaded

    def _freeze(self) -> None:
        # data parallel training waits for the gradient of every parameter that asks for one
        for module in self.modules():
            if isinstance(module, MomaVQTrunk) or (isinstance(module, MomaVQQuantizer) and module.decay is not None):
                module.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # CODEPATH: models without norms, as moma-emoji
        if isinstance(module, MomaVQBranchEnd) and self.config.norm_type == "none":
            init.zeros_(module.weight)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            # a variance that follows the fan-in: without normalisation a fixed one would let the signal die out
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1 / module.num_embeddings, 1 / module.num_embeddings)
        elif isinstance(module, MomaVQQuantizer) and module.decay is not None:
            init.ones_(module.ema_count)
            init.copy_(module.ema_sum, module.embedding.weight)

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        factor, channels = self.config.downsample_factor, self.config.in_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values must have shape (batch_size, {channels}, side, side), got {tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[2:]
        if height != width or height % factor != 0 or height == 0:
            raise ValueError(
                f"pixel_values of {height}x{width} pixels cannot be tokenised: pictures must be square with a side "
                f"that is a multiple of {factor}. Resize them, for example to {self.config.resolution} pixels a side."
            )

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""
        Pictures to latents, before quantisation.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, in_channels, side, side)`):
                Pictures in [-1, 1]; `side` a multiple of `config.downsample_factor`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, embed_dim, grid, grid)`, `grid = side / downsample_factor`.

        Raises:
            `ValueError`: wrong shape.
        """
        self._check_pixel_values(pixel_values)
        return self.quant_conv(self.encoder(pixel_values.to(self.dtype)))

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """Quantised latents `(batch_size, embed_dim, grid, grid)` to pictures, not clipped to [-1, 1].

        Raises:
            `ValueError`: the model has no decoder.
        """
        if self.decoder is None:
            raise ValueError(
                "This picture tokenizer has no decoder (use_decoder=False): it reads pictures, but cannot show any. "
                "Chameleon's checkpoints lack it; convert again with --vqgan and the original vqgan.ckpt."
            )
        return self.decoder(self.post_quant_conv(quantized.to(self.dtype)))

    @torch.no_grad()
    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        r"""
        Pictures to codes.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, in_channels, side, side)`):
                Pictures in [-1, 1]; `side` a multiple of `config.downsample_factor`.

        Returns:
            `torch.LongTensor` of shape `(batch_size, grid * grid)`: codes in `[0, num_embeddings)`, in raster order.

        Raises:
            `ValueError`: wrong shape.
        """
        return self.quantize(self.encode(pixel_values))[2]

    @torch.no_grad()
    def decode_image_tokens(self, image_tokens: torch.Tensor) -> torch.FloatTensor:
        r"""
        Codes to pictures.

        Args:
            image_tokens (`torch.LongTensor` of shape `(batch_size, grid * grid)`):
                Codes in `[0, num_embeddings)`, in raster order.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, in_channels, side, side)`, in [-1, 1].

        Raises:
            `ValueError`: a code outside the codebook, or a number of codes that fills no square.
        """
        if image_tokens.ndim != 2:
            raise ValueError(f"image_tokens must have shape (batch_size, codes), got {tuple(image_tokens.shape)}.")
        grid = math.isqrt(image_tokens.shape[1])
        if grid == 0 or grid * grid != image_tokens.shape[1]:
            raise ValueError(f"image_tokens has {image_tokens.shape[1]} codes a picture, which fill no square grid.")
        size = self.config.num_embeddings
        outside = image_tokens[(image_tokens < 0) | (image_tokens >= size)]
        if outside.numel() > 0:
            raise ValueError(
                f"image_tokens holds {int(outside[0])}, but codes lie in [0, {size}). Vocabulary ids must be turned "
                "into codes first: subtract the id of the first picture token."
            )
        return self.decode(self.quantize.lookup(image_tokens.long(), grid)).clamp(-1, 1)

    @torch.no_grad()
    def initialize_codebook(self, pixel_values: torch.Tensor, iterations: int = 5) -> None:
        """Set the codebook to the k-means centres of the latents of `pixel_values`, once before training."""
        latents = self.encode(pixel_values).float()
        self.quantize.fit(latents.permute(0, 2, 3, 1).flatten(0, 2), iterations)

    @torch.no_grad()
    def update_codebook(self, latents: torch.Tensor, image_tokens: torch.Tensor) -> None:
        r"""
        Let the codebook follow one batch: moving averages, then revival of dead codes. `forward` changes nothing, so a
        training loop calls this after each step with the `latents` and `image_tokens` of the output.

        Args:
            latents (`torch.FloatTensor` of shape `(batch_size, embed_dim, grid, grid)`):
                Vectors before quantisation.
            image_tokens (`torch.LongTensor` of shape `(batch_size, grid * grid)`):
                Their codes.

        Raises:
            `ValueError`: the codebook of this configuration is trained by gradient.
        """
        if self.config.codebook_decay is None:
            raise ValueError(
                "codebook_decay=None: this codebook is trained by gradient and has no averages to update."
            )
        self.quantize.update(latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2), image_tokens.flatten())

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        semantic_targets: torch.FloatTensor | None = None,
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
        reconstruction_loss = self.config.l1_weight * F.l1_loss(
            reconstruction, target
        ) + self.config.l2_weight * F.mse_loss(reconstruction, target)
        loss = reconstruction_loss + commitment_loss

        perceptual_loss = None
        if perceptual_distance is not None:
            perceptual_loss = perceptual_distance(reconstruction, target)
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
            codebook_usage=self.codebook_perplexity(image_tokens),
        )

    def semantic_loss(self, prediction: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
        """1 - cosine, plus a tenth of the mean squared error, which fixes the length."""
        if prediction is None:
            raise ValueError(
                "semantic_targets were given, but config.semantic_dim is None: this model has no such head."
            )
        if targets.shape != prediction.shape:
            raise ValueError(
                f"semantic_targets must have shape {tuple(prediction.shape)} (batch_size, config.semantic_dim), got "
                f"{tuple(targets.shape)}."
            )
        targets = targets.float()
        return (1 - F.cosine_similarity(prediction, targets)).mean() + 0.1 * F.mse_loss(prediction, targets)

    def codebook_perplexity(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """Exponential of the entropy of the codes: the number of codes in use, if they were used alike."""
        counts = torch.bincount(image_tokens.flatten(), minlength=self.config.num_embeddings).float()
        return torch.special.entr(counts / counts.sum()).sum().exp()


__all__ = ["MomaVQModel", "MomaVQOutput"]
