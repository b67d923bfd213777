# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities that a model gives to continuations, every one after every beginning.

Shape suffixes:
    P prefixes, C continuations, B continuations at once, T their length, V vocabulary.
"""

import copy
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from ..errors_moma import InputError


@torch.no_grad()
def continuation_log_probs(
    model,
    prefixes: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int,
    description: str = "scores",
) -> torch.Tensor:
    """Return `log p(continuation | prefix)` in nats, summed over the tokens of the continuation.

    Every prefix is read once; its continuations go on from the cache of it.
    """
    if not all(map(len, prefixes)) or not all(map(len, continuations)):
        raise InputError("`prefixes` or `continuations` has an empty one: each needs one token at least.")
    scores_PC = torch.empty(len(prefixes), len(continuations), dtype=torch.float64)
    # rows of about one length pad little
    order = sorted(range(len(continuations)), key=lambda index: len(continuations[index]))
    for row, prefix in enumerate(tqdm(prefixes, desc=description)):
        ids = torch.tensor([list(prefix)], device=model.device)
        cache = DynamicCache(config=model.config)
        last_V = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            scores_PC[row, chosen] = _scores(model, cache, last_V, [continuations[index] for index in chosen]).cpu()
    return scores_PC


def _scores(model, cache: DynamicCache, last_V: torch.Tensor, continuations: list[Sequence[int]]) -> torch.Tensor:
    """Return the scores `[B]` of continuations of the prefix that the cache holds, whose last logits are `last_V`."""
    lengths_B = torch.tensor([len(ids) for ids in continuations])
    rows = [torch.as_tensor(ids, dtype=torch.long) for ids in continuations]
    # id 0 is a token like any other: the mask hides what stands behind the end
    ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    is_token_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).to(model.device)
    scores_B = last_V.double().log_softmax(-1)[ids_BT[:, 0]]
    if ids_BT.shape[1] == 1:
        return scores_B
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(len(rows))
    # the last token predicts nothing; a row that ends earlier has padding for it
    seen_BT = torch.ones(len(rows), int(cache.get_seq_length()), dtype=torch.bool, device=model.device)
    mask_BS = torch.cat([seen_BT, is_token_BT[:, :-1]], dim=1).long()
    logits_BTV = model(input_ids=ids_BT[:, :-1], attention_mask=mask_BS, cache=cache, use_cache=True).logits
    losses_BT = torch.nn.functional.cross_entropy(logits_BTV.float().transpose(1, 2), ids_BT[:, 1:], reduction="none")
    return scores_B - (losses_BT.double() * is_token_BT[:, 1:]).sum(dim=1)


@torch.no_grad()
def paired_log_probs(
    model, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], batch_size: int
) -> torch.Tensor:
    """Return `log p(continuation | prefix)` in nats for each prefix with the continuation of its own."""
    if not all(map(len, prefixes)) or not all(map(len, continuations)) or len(prefixes) != len(continuations):
        raise InputError("`prefixes` and `continuations` are to be pairs, and to have one token at least each.")
    scores = []
    for start in range(0, len(prefixes), batch_size):
        chosen = slice(start, start + batch_size)
        pairs = list(zip(prefixes[chosen], continuations[chosen]))
        rows = [torch.tensor([*prefix, *continuation]) for prefix, continuation in pairs]
        ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        place_T = torch.arange(ids_BT.shape[1])
        begins_B1 = torch.tensor([[len(prefix)] for prefix, _ in pairs])
        lengths_B1 = torch.tensor([[len(row)] for row in rows])
        is_scored_BT = ((place_T >= begins_B1) & (place_T < lengths_B1)).to(model.device)
        mask_BT = (place_T < lengths_B1).long().to(model.device)
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1]
        losses_BT = torch.nn.functional.cross_entropy(
            logits_BTV.float().transpose(1, 2), ids_BT[:, 1:], reduction="none"
        )
        scores.append(-(losses_BT.double() * is_scored_BT[:, 1:]).sum(dim=1).cpu())
    return torch.cat(scores)
