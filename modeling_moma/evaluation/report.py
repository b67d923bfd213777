# SPDX-License-Identifier: Apache-2.0
"""The figures of [`measure_sources`] and of causal routing rules as Markdown tables."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..calibration.auxiliary_training import PAPER_THRESHOLD
from ..frames_moma import TEXT
from ..utils.messages import markdown_table
from .evaluate import CAPTIONS, DRAWINGS, INFORMATION, LOSSES, RETRIEVAL
from .losses import WORDS


# names are those of `auxiliary_report`
CAUSAL_RULES = {
    "threshold": "`threshold`",
    "auxiliary_0.5": f"`auxiliary`, cut at {PAPER_THRESHOLD} (the paper)",
    "auxiliary": "`auxiliary`, the model's cuts",
}
# columns of the tables: figures of `auxiliary_report` and their headings
QUALITIES = {"accuracy": "acc.", "precision": "prec.", "recall": "rec.", "load": "load"}


def report_tables(sources: dict[str, dict]) -> str:
    """Return a table for each measure that was taken, one after the other."""
    tables = {
        LOSSES: loss_table,
        CAPTIONS: caption_table,
        INFORMATION: information_table,
        RETRIEVAL: retrieval_table,
        DRAWINGS: drawing_table,
    }
    return "\n\n".join(
        table(taken)
        for measure, table in tables.items()
        if (taken := {name: figures[measure] for name, figures in sources.items() if measure in figures})
    )


def loss_table(losses: dict[str, dict]) -> str:
    """Return the losses by source and routing, in nats for each target token."""
    rows = [(name, routing, part) for name, by_routing in losses.items() for routing, part in by_routing.items()]
    modalities = list(dict.fromkeys(modality for _, _, part in rows for modality in part["bits_per_code"]))
    codes = [column for name in modalities for column in (f"{name} codes", f"bits per {name} code")]
    head = ["loss, nats per target", "overall", "text", "words", "perplexity of words", *codes, "targets"]
    body = []
    for name, routing, part in rows:
        figures = [part["overall"], part.get(TEXT), part[WORDS]]
        cells = [_number(figure, 4) for figure in figures] + [_number(part["perplexity"], 2)]
        for modality in modalities:
            cells += [_number(part.get(modality), 4), _number(part["bits_per_code"].get(modality), 3)]
        body.append([f"{name}, {routing}", *cells, f"{part['targets']['overall']:,}"])
    return markdown_table(head, body)


def caption_table(captions: dict[str, dict]) -> str:
    """Return exact match and overlap of words by source, with their floors."""
    body = []
    for name, part in captions.items():
        for label, key in ((name, "generated"), (f"{name}, against other images' captions", "floor")):
            scores = part[key] or {}
            body.append([label, *(_share(scores.get(score)) for score in ("exact_match", "overlap"))])
            body[-1].append(f"{part['images']:,}")
    return markdown_table(["captions, greedy", "exact match", "overlap of words (F1)", "images"], body)


def information_table(information: dict[str, dict]) -> str:
    """Return what images take from their captions and captions from their images, in nats a pair, by source."""
    body = []
    for name, part in information.items():
        for taker, giver in (("image", "caption"), ("caption", "image")):
            figures = part[taker]
            cells = [_number(figures[column], 2) for column in ("alone", "with_other", "taken", "standard_error")]
            body.append([f"{name}, {taker} and its {giver}", *cells, f"{part['pairs']:,}"])
    return markdown_table(["nats", "alone", "behind the other", "taken from it", "standard error", "pairs"], body)


def retrieval_table(retrieval: dict[str, dict]) -> str:
    """Return ranks by source, direction and score, with what chance would reach."""
    body = []
    for name, part in retrieval.items():
        for answers in ("captions", "images"):
            title = f"{name}: {answers}"
            for score, figures in part[answers].items():
                body.append([f"{title} by {score}", *_rank_cells(figures), f"{part['pairs']:,}"])
            chance = next(iter(part[answers].values()))["chance"]
            body.append([f"{title}, chance", *_rank_cells(chance), f"{part['pairs']:,}"])
    return markdown_table(
        ["retrieval by log-probability", "recall@1", "recall@5", "mean reciprocal rank", "median rank", "pairs"], body
    )


def _rank_cells(figures: dict[str, Any]) -> Iterator[str]:
    for name in ("recall@1", "recall@5"):
        yield _share(figures[name])
    yield _number(figures["mean_reciprocal_rank"], 3)
    yield f"{figures['median_rank']:g}"


def drawing_table(drawings: dict[str, dict]) -> str:
    """Return comparisons with real images by source, each with the number of images that it stands on."""
    body = []
    for name, part in drawings.items():
        # a source without pixels has its reconstructions for them
        label = name if part["real"] == "images" else f"{name} (real: reconstructions)"
        for comparison, figures in part["comparisons"].items():
            shares = [_share(figures[score]) for score in ("precision", "recall")]
            distance = _number(figures["frechet_distance"], 2)
            body.append([f"{label}: {comparison}", distance, *shares, f"{figures['images']:,}"])
    head = [
        "against real images, judge's features",
        "Frechet distance",
        "precision",
        "recall",
        "images on either side",
    ]
    return markdown_table(head, body)


def router_table(routers: Sequence[dict]) -> str:
    """Return a Markdown table of how well causal rules hit the oracle's choice, a row for each layer and group."""
    titles = {rule: title for rule, title in CAUSAL_RULES.items() if rule in routers[0]["rules"]}
    rows = []
    for router in routers:
        cells = [" / ".join(_percent(router["rules"][rule][name]) for name in QUALITIES) for rule in titles]
        rows.append([f"{router['layer']}, {router['group']}", _percent(router["true_load"]), *cells])
    qualities = " / ".join(QUALITIES.values())
    head = ["layer, group", "oracle's load, %", *(f"{title}: {qualities}, %" for title in titles.values())]
    return markdown_table(head, rows)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
