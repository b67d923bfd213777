# SPDX-License-Identifier: Apache-2.0
"""A codebook of moving averages in two processes, against one that sees the latents of both."""

import torch

from helpers.processes import run_group
from tokenization.configuration_moma_vq import MomaVQConfig
from tokenization.modeling_moma_vq import MomaVQQuantizer


def quantizer_of(threshold):
    torch.manual_seed(0)
    config = MomaVQConfig.from_preset("small", num_embeddings=6, embed_dim=3, codebook_decay=0.5)
    quantizer = MomaVQQuantizer(config).requires_grad_(False)
    quantizer.revive_threshold = threshold
    quantizer.ema_sum.copy_(quantizer.embedding.weight)
    return quantizer


def batch_of(rank, step):
    """Latents and codes; in one step the second process has none, and in one nobody."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    count = 0 if (step == 2 and rank == 1) or step == 3 else 5
    return torch.randn(count, 3, generator=generator), torch.randint(4, (count,), generator=generator)


def train(rank, folder, threshold):
    quantizer = quantizer_of(threshold)
    torch.manual_seed(rank)
    with torch.no_grad():
        for step in range(5):
            quantizer.update(*batch_of(rank, step))
        averaged = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
        quantizer.fit(torch.randn(8, 3), 2)
    torch.save((averaged, quantizer.state_dict()), f"{folder}/{threshold}-{rank}.pt")


def test_two_processes_keep_one_codebook(tmp_path):
    for threshold in (0.0, 0.4):
        run_group(train, str(tmp_path), threshold)
        first, second = (torch.load(tmp_path / f"{threshold}-{rank}.pt") for rank in range(2))
        for one, other in zip(first, second):
            for name, tensor in one.items():
                assert torch.equal(tensor, other[name]), name
    # where none is revived, it is what the latents of both give
    alone = quantizer_of(0.0)
    with torch.no_grad():
        for step in range(5):
            alone.update(*(torch.cat(parts) for parts in zip(batch_of(0, step), batch_of(1, step))))
    both, _ = torch.load(tmp_path / "0.0-0.pt")
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(both[name], tensor)
