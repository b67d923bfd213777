# SPDX-License-Identifier: Apache-2.0
"""The codebook of the image tokenizer: nearest codes, moving averages, revival and k-means."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from .configuration_moma_vq import MomaVQConfig


# Latents compared with the codebook at once: on a CPU so many that the distances stay in its cache, elsewhere so many
# that they take 256 MiB.
ASSIGN_CHUNK = 512
_ASSIGN_DISTANCES = 2**26


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
