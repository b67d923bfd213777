# SPDX-License-Identifier: Apache-2.0
"""How well causal rules hit the top K that they stand for, in exact counts.

Shape suffixes:
    N tokens that compete for a router, S scores of a token,
    C thresholds of a router (one for each expert, or for each pool of a depth router).
"""

import torch
import torch.distributed as dist

from ..token_groups_moma import is_distributed
from .observation import RouterRecord, Rule, router_place


class SelectionCounts:
    """Exact counts of what rules take of a router's tokens, threshold by threshold, over any number of batches."""

    def __init__(self, rules: dict[str, Rule]):
        self.rules = rules
        # rows of a router's table: tokens, members, then (taken, members taken) of each rule
        self.tables: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, record: RouterRecord):
        """Count one router's forward."""
        takes = [rule(record) for rule in self.rules.values()]
        columns = [torch.ones_like(record.is_member_NS), record.is_member_NS]
        for take_NS in takes:
            columns += [take_NS, take_NS & record.is_member_NS]
        flags = torch.stack([column.flatten() for column in columns]).long()
        num_thresholds = record.router.threshold.shape[0]
        table = torch.zeros(flags.shape[0], num_thresholds, dtype=torch.long, device=flags.device)
        table.index_add_(1, record.threshold_index_NS.flatten(), flags)
        self.tables[record.name] = self.tables.get(record.name, 0) + table.cpu()

    def reduce(self, device: torch.device):
        """Add up the counts of all processes, on a device where they can meet."""
        self.tables = sum_over_ranks(self.tables, device)

    def rows(self) -> list[dict]:
        """Return one row for each router, for JSON: see [`auxiliary_report`]."""
        return [{**_place(name), **self._ratios(table)} for name, table in self.tables.items()]

    def totals(self, rule: str) -> dict[str, float | None]:
        """Return a rule's `accuracy`, `precision`, `recall`, `load` and the `true_load` over all routers together."""
        summed = self._ratios(torch.stack([table.sum(1, keepdim=True) for table in self.tables.values()]).sum(0))
        quality = {name: value for name, value in summed["rules"][rule].items() if name != "loads"}
        return {**quality, "true_load": summed["true_load"]}

    def _ratios(self, table: torch.Tensor) -> dict:
        tokens_C, members_C, *taken = table.tolist()
        tokens, members = sum(tokens_C), sum(members_C)
        result = {
            "tokens": tokens_C,
            "true_load": _ratio(members, tokens),
            "true_loads": [_ratio(*pair) for pair in zip(members_C, tokens_C)],
            "rules": {},
        }
        for rule, taken_C, hits_C in zip(self.rules, taken[::2], taken[1::2]):
            takes, hits = sum(taken_C), sum(hits_C)
            result["rules"][rule] = {
                "accuracy": _ratio(tokens - members - takes + 2 * hits, tokens),
                "precision": _ratio(hits, takes),
                "recall": _ratio(hits, members),
                "load": _ratio(takes, tokens),
                "loads": [_ratio(*pair) for pair in zip(taken_C, tokens_C)],
            }
        return result


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _place(name: str) -> dict[str, str | int]:
    layer, group = router_place(name)
    return {"router": name, "layer": layer, "group": group or "depth"}


def sum_over_ranks(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Sum tensors by name over all processes, in one collective."""
    if not is_distributed():
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()]).to(device)
    dist.all_reduce(flat)
    parts = flat.cpu().split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view_as(tensors[name]) for name, part in zip(tensors, parts)}
