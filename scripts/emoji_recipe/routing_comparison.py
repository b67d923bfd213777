# SPDX-License-Identifier: Apache-2.0
"""Compares what one trained model loses under causal routings with the routing that it was trained with."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modeling_moma.auxiliary_moma import MomaAuxiliaryRouter
from modeling_moma.tools.auxiliary_training import PAPER_THRESHOLD, auxiliary_report
from modeling_moma.training.measures import EXPERT_CHOICE, LOSSES, gaps, held_out_loss, padded_batches
from modeling_moma.training.router_table import AT_PAPER_THRESHOLD, CAUSAL_RULES, router_table
from modeling_moma.training.tables import markdown_table


ORACLE = "expert_choice"
RULES = {ORACLE: f"oracle: {EXPERT_CHOICE}", **CAUSAL_RULES}
# largest gap that the best causal rule shall have
AIM_GAP = 0.01


def auxiliary_routers(model) -> list[MomaAuxiliaryRouter]:
    """The auxiliary routers of a model with thresholds of their own.

    Raises:
        ValueError: it has none, or the thresholds of all are the paper's, so that two rules would be the same.
    """
    routers = [module for module in model.modules() if isinstance(module, MomaAuxiliaryRouter)]
    if not routers:
        raise ValueError(
            "`model` has no auxiliary routers (config.auxiliary_routers is False): `moma train-auxiliary-routers` "
            "adds and trains them."
        )
    if all((router.threshold == PAPER_THRESHOLD).all() for router in routers):
        raise ValueError(
            f"`model` has auxiliary routers whose thresholds are all {PAPER_THRESHOLD}: were they never calibrated? "
            "`moma calibrate` does it."
        )
    return routers


@contextmanager
def paper_thresholds(model) -> Iterator[None]:
    """Within it, all auxiliary routers of a model cut at 0.5; then each has its own thresholds back."""
    routers = auxiliary_routers(model)
    kept = [router.threshold.clone() for router in routers]
    try:
        for router in routers:
            router.threshold.fill_(PAPER_THRESHOLD)
        yield
    finally:
        for router, threshold in zip(routers, kept):
            router.threshold.copy_(threshold)


@torch.no_grad()
def measure(model, processor, examples: list[dict], batch_size: int) -> dict:
    """
    Held-out losses of a model under each of `RULES`, and how well the causal ones predict the oracle's choice.

    Args:
        model: in eval mode, with trained and calibrated auxiliary routers.
        processor: its tokenizer pads.
        examples: `input_ids` each, in an order that mixes their kinds.
        batch_size: examples at once, which compete with one another under the oracle.

    Returns:
        `loss` by rule; `gap` of each causal rule, the share by which its losses lie above the oracle's; and `routers`,
        the rows of `auxiliary_report`.

    Raises:
        ValueError: see [`auxiliary_routers`].
    """
    auxiliary_routers(model)

    def loss(rule, routing):
        return held_out_loss(model, processor, examples, batch_size, routing, f"loss: {rule}")

    losses = {rule: loss(rule, rule) for rule in RULES if rule != AT_PAPER_THRESHOLD}
    with paper_thresholds(model):
        losses[AT_PAPER_THRESHOLD] = loss(AT_PAPER_THRESHOLD, "auxiliary")
    return {
        "loss": {rule: losses[rule] for rule in RULES},
        "gap": {rule: gaps(losses[rule], losses[ORACLE]) for rule in CAUSAL_RULES},
        "routers": auxiliary_report(model, padded_batches(processor, examples, batch_size)),
    }


def verdict(result: dict) -> str:
    """Which causal rule is best and whether it is as near to the oracle as aimed, and what calibration brings."""
    overall = {rule: result["gap"][rule]["overall"] for rule in CAUSAL_RULES}
    best = min(overall, key=overall.get)
    reached = "reached" if overall[best] <= AIM_GAP else "not reached"
    change = result["loss"]["auxiliary"]["overall"] - result["loss"][AT_PAPER_THRESHOLD]["overall"]
    effect = "changes nothing" if change == 0 else f"{'lowers' if change < 0 else 'raises'} the overall loss by "
    if change:
        effect += f"{abs(change):.4f} nats"
    losses = [result["loss"][rule]["overall"] for rule in CAUSAL_RULES]
    return (
        f"The overall losses of the causal rules lie within {max(losses) - min(losses):.4f} nats of one another. "
        f"Best of the causal rules: {CAUSAL_RULES[best]}, whose overall loss lies {_above(overall[best])} the "
        f"oracle's (aim of at most {100 * AIM_GAP:g} % above: {reached}). Calibration of the auxiliary routers "
        f"{effect}."
    )


def _above(gap):
    return f"{100 * abs(gap):.2f} % {'below' if gap < 0 else 'above'}"


def loss_table(result: dict) -> str:
    """Markdown table of the losses, behind each its gap to the oracle's."""
    rows = []
    for rule, title in RULES.items():
        gap = result["gap"].get(rule)
        behind = {name: f" ({100 * gap[name]:+.2f} %)" if gap else "" for name in LOSSES}
        rows.append([title, *(f"{result['loss'][rule][name]:.4f}{behind[name]}" for name in LOSSES)])
    return markdown_table(["held-out loss, nats per target token (to oracle)", *LOSSES.values()], rows)


def comparison_report(report: dict) -> str:
    """The report of scripts/compare_routings.py as Markdown: tables, then words."""
    settings = (
        f"{report['date']}, `{report['command']}`: one model, {report['examples']} examples of the {report['split']} "
        f"split, both orders of each picture shuffled together, {report['batch_size']} in a batch; the oracle's loss "
        "depends on the batch."
    )
    note = (
        "Accuracy / precision / recall / load in %: of all (token, expert) pairs, on how many a rule and the oracle "
        "agree; of those that the rule takes, how many the oracle takes; of the oracle's, how many the rule takes; "
        "and how many it takes of all. Every router is asked about what it sees when the oracle routes the layers "
        "before it."
    )
    # not the settings: a command has to stay in one line
    words = [
        textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) for text in (note, verdict(report))
    ]
    parts = [
        "# One model under several routings",
        loss_table(report),
        router_table(report["routers"]),
        *words,
        settings,
    ]
    return "\n\n".join(parts) + "\n"
