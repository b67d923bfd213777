# SPDX-License-Identifier: Apache-2.0
"""How well causal rules hit the oracle's choice, as a table."""

from collections.abc import Sequence

from modeling_moma.tools.auxiliary_training import PAPER_THRESHOLD
from modeling_moma.training.tables import markdown_table


AT_PAPER_THRESHOLD = "auxiliary_0.5"


# names are those of `auxiliary_report`
CAUSAL_RULES = {
    "threshold": "`threshold`",
    AT_PAPER_THRESHOLD: f"`auxiliary`, cut at {PAPER_THRESHOLD} (the paper)",
    "auxiliary": "`auxiliary`, calibrated cuts",
}


# what tables tell of a rule, of `auxiliary_report`
QUALITIES = {"accuracy": "acc.", "precision": "prec.", "recall": "rec.", "load": "load"}


def router_table(routers: Sequence[dict]) -> str:
    """Markdown table of how well causal rules hit the oracle's choice, a row for each layer and group.

    Args:
        routers: rows of `auxiliary_report`, or of a calibration, which has one rule alone.
    """
    titles = {rule: title for rule, title in CAUSAL_RULES.items() if rule in routers[0]["rules"]}
    rows = []
    for router in routers:
        cells = [" / ".join(_percent(router["rules"][rule][name]) for name in QUALITIES) for rule in titles]
        rows.append([f"{router['layer']}, {router['group']}", _percent(router["true_load"]), *cells])
    qualities = " / ".join(QUALITIES.values())
    head = ["layer, group", "oracle's load, %", *(f"{title}: {qualities}, %" for title in titles.values())]
    return markdown_table(head, rows)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
