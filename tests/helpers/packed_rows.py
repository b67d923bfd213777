# SPDX-License-Identifier: Apache-2.0
"""Models and packed rows by which tests find out whether documents see one another."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

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


def second_documents(layout):
    """Where the rows' second documents lie, `[B, T]`."""
    is_second = torch.zeros(len(layout), LENGTH, dtype=torch.bool)
    for row, (first, second) in enumerate(layout):
        is_second[row, first : first + second] = True
    return is_second


def logits_and_gradients(model, batch, is_counted_BT):
    """Logits, and gradients of some tokens' loss: those of the embedded tokens, and those of the weights."""
    # a training step moves the buffers of routers
    model = copy.deepcopy(model)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    # the mean of embeddings that stand in place of ids would be a mean over rows of another meaning
    kinds = ((batch["input_ids"] >= 8) & (batch["input_ids"] < 24)).long()
    inputs = {name: values for name, values in batch.items() if name not in ("input_ids", "labels")}
    logits = model(inputs_embeds=embeds, mm_token_type_ids=kinds, use_cache=False, **inputs).logits
    is_target_BT = is_counted_BT[:, 1:] & is_counted_BT[:, :-1]
    loss = cross_entropy(logits[:, :-1][is_target_BT], batch["input_ids"][:, 1:][is_target_BT], reduction="sum")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first, *others = torch.autograd.grad(loss, [embeds, *parameters], allow_unused=True)
    return logits.detach(), first, [grad for grad in others if grad is not None]


def largest_difference(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def refused(model, *args, **kwargs):
    with pytest.raises(ValueError) as error, torch.no_grad():
        model(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


__all__ = [
    "DEPTH",
    "LENGTH",
    "MODELS",
    "ROWS",
    "batch_with_lengths",
    "largest_difference",
    "lengths_of",
    "logits_and_gradients",
    "model_of",
    "packed_rows",
    "refused",
    "restarting",
    "second_documents",
]
