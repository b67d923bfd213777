# SPDX-License-Identifier: Apache-2.0
"""Models and packed rows by which tests find out whether documents see one another."""

import pytest
import torch

from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.data.packing import PackedCollator


DEPTH = {"num_hidden_layers": 4, "depth_layers": [0, 2], "depth_capacity": 0.5}
MODELS = {
    "full": {"num_hidden_layers": 2},
    "depth": DEPTH,
    "rare depth": {**DEPTH, "depth_capacity": 0.1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
}
LENGTH = 64
# two documents in each row, and what is left
ROWS = {"full rows": [[40, 24]] * 5, "padded": [[30, 22], [10, 54], [48, 1], [5, 40], [33, 31]]}


def model_of(name="full", seed=0, **fields):
    fields = {"norm_placement": "pre", "routing_warmup_steps": 0, "training_routing": "threshold", **fields}
    model = tiny_model(seed=seed, initializer_range=0.2, **{**fields, **MODELS[name]}).eval()
    cuts = torch.Generator().manual_seed(1)
    for module, buffer in model.named_buffers():
        if module.endswith("router.threshold"):
            buffer.copy_(0.5 + 0.05 * torch.randn(buffer.shape, generator=cuts))
    return model


def restarting(lengths):
    """Positions of a row of documents of these lengths, and of the padding behind them."""
    lengths = [*lengths, LENGTH - sum(lengths)]
    return torch.cat([torch.arange(length) for length in lengths])


def packed_rows(layout, seed=0):
    """Rows of a stream of packed documents; another seed gives other first documents."""
    rows = []
    ids, others = mixed_ids(len(layout), LENGTH), mixed_ids(len(layout), LENGTH, seed)
    for index, lengths in enumerate(layout):
        row, positions = ids[index].clone(), restarting(lengths)
        row[: lengths[0]] = others[index, : lengths[0]]
        row[sum(lengths) :] = 0
        labels = torch.where(positions > 0, row, -100)
        labels[sum(lengths) :] = -100
        mask = (torch.arange(LENGTH) < sum(lengths)).long()
        rows.append({"input_ids": row, "attention_mask": mask, "position_ids": positions, "labels": labels})
    return rows


def lengths_of(position_ids):
    """The lengths of flash attention that some collators give: where positions begin again, a document does."""
    is_start = torch.nn.functional.pad(position_ids.diff() != 1, (1, 0), value=True).flatten()
    starts = torch.cat([is_start.nonzero().squeeze(1), torch.tensor([is_start.numel()])]).int()
    longest = int(starts.diff().max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def batch_with_lengths(layout, seed=0):
    """A batch of packed rows, and where their documents lie."""
    batch = PackedCollator(None)(packed_rows(layout, seed))
    return batch | lengths_of(batch["position_ids"])


def largest_difference(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def refused(model, *args, **kwargs):
    with pytest.raises(ValueError) as error, torch.no_grad():
        model(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)
