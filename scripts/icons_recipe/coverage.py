# SPDX-License-Identifier: Apache-2.0
"""How many tokens get a routed expert at inference, layer by layer; the others have the shared one alone."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from modeling_moma.calibration.observation import RouterRecord, has_routers, observed_routers, router_place
from modeling_moma.token_groups_moma import token_modalities


@torch.no_grad()
def expert_coverage(model, documents: Sequence[Sequence[int]], batch_size: int) -> dict[str, list[float]]:
    """
    Counts the tokens that at least one routed expert takes by the model's inference routing.

    Args:
        model: a `MomaForCausalLM` in eval mode, without depth layers.
        documents: token ids of each.
        batch_size: documents at once.

    Returns:
        The share in [0, 1] in each layer, by modality; nothing where no group has several experts.
    """
    if not has_routers(model.config):
        return {}
    modalities = model.config.modalities
    taken, number = defaultdict(int), defaultdict(int)
    modality_N = torch.empty(0)

    def observe(record: RouterRecord):
        layer, group = router_place(record.name)
        if group is None:
            return
        mine = [modalities.index(name) for name in model.config.expert_groups[group]]
        # a router sees its group's tokens in their order
        modality_M = modality_N[torch.isin(modality_N, torch.tensor(mine, device=modality_N.device))]
        is_taken_M = record.is_taken_NS.any(dim=1)
        for place in mine:
            taken[modalities[place], layer] += int(is_taken_M[modality_M == place].sum())
            number[modalities[place], layer] += int((modality_M == place).sum())

    with observed_routers(model, observe):
        for batch in _of_one_length(documents, batch_size):
            ids = torch.tensor(batch, device=model.device)
            modality_N = token_modalities(model.config, ids).flatten()
            model.base_model(input_ids=ids, use_cache=False)
    found = defaultdict(list)
    for modality, layer in sorted(number):
        found[modality].append(taken[modality, layer] / max(number[modality, layer], 1))
    return dict(found)


def _of_one_length(documents, batch_size):
    """Batches without padding, whose tokens would be no tokens."""
    by_length = defaultdict(list)
    for ids in documents:
        by_length[len(ids)].append(list(ids))
    for rows in by_length.values():
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
