# SPDX-License-Identifier: Apache-2.0
"""
Writes the tables and the figure of docs/study.md from the study's rows and the times of its steps.

    python scripts/study_report.py

What stands between `<!-- study: start -->` and `<!-- study: end -->` of the page is replaced.
"""

import argparse
import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import matplotlib
import pyarrow.parquet

from modeling_moma.errors_moma import InputError
from modeling_moma.utils.atomic_files import atomic_write


REPOSITORY = Path(__file__).resolve().parent.parent
START, END = "<!-- study: start -->", "<!-- study: end -->"
# recipes are chosen by `validation`, and what is claimed is measured on this
SPLIT = "test"
# columns of a table: what is measured, and its name
PARTS = {"overall": "all", "image": "image", "text": "text"}
BASELINE = "dense"
DRAWN = (BASELINE, "1t1i", "4t4i-shared-upcycled")
# by size
LEARNING_RATES = {"0.5M": 4e-3, "1M": 3e-3, "2.5M": 2e-3}
# recipes in which one thing is changed, and the recipe that it is changed in
LEVERS = {
    "4t4i-covered-shared": "4t4i-shared",
    "4t4i-token-choice-shared": "4t4i-shared",
    "untied-4t4i-shared": "4t4i-shared",
    "8t8i-c2-shared": "4t4i-shared",
    "4t4i-shared-depth": "4t4i-shared",
    "4t4i-shared-depth-text": "4t4i-shared",
    "4t4i-c2": "4t4i",
    "4t4i-c1.25": "4t4i",
    "4t4i-threshold": "4t4i",
    "8x-token-choice": "4t4i",
    "8x-token-choice-biases": "8x-token-choice",
    "untied-1t1i": "1t1i",
}
Row = Mapping[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "docs" / "study" / "runs.parquet")
    parser.add_argument("--times", type=Path, default=REPOSITORY / "docs" / "study" / "step-times.json")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "study.md")
    parser.add_argument("--figure", type=Path, default=REPOSITORY / "docs" / "images" / "study.svg")
    args = parser.parse_args(arguments)
    rows = read_opened(args.results)
    text, seconds = args.page.read_text(), json.loads(args.times.read_text())["seconds"]
    if START not in text or END not in text:
        print(f"--page {str(args.page)!r} lacks {START} or {END}.", file=sys.stderr)
        return 1
    parts = {
        "Losses and eta": loss_table(rows, seconds),
        "Levers": lever_table(rows),
        "Cost of a token": cost_table(rows),
        "Time of a step": time_table(seconds),
    }
    tables = "\n".join(f"### {title}\n\n{content}\n" for title, content in parts.items())
    draw_losses(rows, args.figure)
    page = f"{text.partition(START)[0]}{START}\n{tables}\n{END}{text.partition(END)[2]}"
    atomic_write(args.page, lambda path: path.write_text(page))
    print(f"{args.page}: {len(rows)} rows")
    return 0


def read_opened(path: Path) -> list[Row]:
    """Return the rows of a file with the JSON that this page needs read."""
    rows = pyarrow.parquet.read_table(path).to_pylist()
    return [{**row, **{name: json.loads(row[name]) for name in ("counts", "losses")}} for row in rows]


def losses_of(row: Row) -> dict[str, float]:
    """Return a row's causal losses in nats a target, the mean over the tokens of the training's mixture."""
    sums, weights = defaultdict(float), defaultdict(float)
    for entry in row["losses"]:
        # words are a part of text
        if (entry["split"], entry["routing"]) == (SPLIT, "causal") and entry["modality"] in PARTS:
            weight = row["counts"]["shares"][entry["source"]][entry["modality"]]
            for part in (entry["modality"], "overall"):
                sums[part] += weight * entry["loss"]
                weights[part] += weight
    return {part: sums[part] / weights[part] for part in PARTS}


def tokens_needed(curve: Sequence[tuple[float, float]], loss: float) -> float:
    """Return the tokens at which a curve of (tokens, loss) reaches a loss.

    It is linear in the logarithm of the tokens, between its points and beyond them.
    """
    points = sorted(curve)
    pieces = list(zip(points, points[1:]))
    if not pieces or any(after[1] >= before[1] for before, after in pieces):
        raise InputError(f"`curve` = {points}: two points are needed, and a loss that falls.")
    # beyond its ends the nearest piece goes on
    before, after = next((piece for piece in pieces if loss >= piece[1][1]), pieces[-1])
    share = (before[1] - loss) / (before[1] - after[1])
    return math.exp(math.log(before[0]) + share * (math.log(after[0]) - math.log(before[0])))


@dataclass(frozen=True)
class Saving:
    """What dense needs for a row's loss over what the row needed: in FLOPs and in tokens.

    `is_beyond` tells that dense's tokens lie outside its budgets.
    """

    flops: float
    tokens: float
    is_beyond: bool


def saving(row: Row, dense: Sequence[Row], part: str) -> Saving:
    """Return what a row saves over dense rows of two budgets or more."""
    curve = [(float(other["tokens"]), losses_of(other)[part]) for other in dense]
    needed = tokens_needed(curve, losses_of(row)[part])
    ratio = needed / row["tokens"]
    is_beyond = not min(curve)[0] <= needed <= max(curve)[0]
    return Saving(ratio * dense[0]["flops_a_token"] / row["flops_a_token"], ratio, is_beyond)


def partners(row: Row, rows: Iterable[Row]) -> list[Row]:
    """Return the dense rows of a row's size, seed, data and rate; none where dense has not come as far."""
    same = ("size", "seed", "data", "learning_rate")
    dense = [other for other in rows if other["recipe"] == BASELINE and all(other[name] == row[name] for name in same)]
    return dense if any(other["budget"] >= row["budget"] for other in dense) else []


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Return a mean with the standard deviation over seeds, where there are several."""
    mean = f"{fmean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{digits}f}"


def loss_table(rows: Sequence[Row], seconds: Mapping[str, Sequence[float]]) -> str:
    """Return causal losses, their distance from dense's and eta, a line for each recipe and budget but levers."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if row["recipe"] not in LEVERS:
            rate = row["learning_rate"] / LEARNING_RATES[row["size"]]
            groups[row["data"], row["size"], rate, row["budget"], row["recipe"]].append(row)
    header = ["data", "size", "rate", "tokens", "recipe", "seeds", *PARTS.values()]
    header += [f"less dense, {name}" for name in PARTS.values()] + [f"eta, {name}" for name in PARTS.values()]
    lines = []
    for (data, size, rate, budget, recipe), group in sorted(groups.items()):
        group = sorted(group, key=lambda row: row["seed"])
        seeds = ", ".join(str(row["seed"]) for row in group)
        line = [data, size, f"{rate:g}", f"{budget}M", recipe, seeds]
        line += [spread([losses_of(row)[part] for row in group], 3) for part in PARTS]
        compared = [(row, partners(row, rows)) for row in group if recipe != BASELINE]
        at_budget = [(row, other) for row, dense in compared for other in dense if other["budget"] == row["budget"]]
        for part in PARTS:
            gaps = [losses_of(row)[part] - losses_of(other)[part] for row, other in at_budget]
            line.append(spread(gaps, 3, "+") if gaps else "")
        compared = [(row, dense) for row, dense in compared if len(dense) > 1]
        for part in PARTS:
            savings = [saving(row, dense, part) for row, dense in compared]
            star = " *" if any(each.is_beyond for each in savings) else ""
            line.append(spread([each.flops for each in savings], 2) + star if savings else "")
        savings = [saving(row, dense, "overall") for row, dense in compared]
        slower = time_over(seconds, recipe)
        is_timed = savings and slower and size == "0.5M"
        lines.append([*line, spread([each.tokens / slower for each in savings], 2) if is_timed else ""])
    return table([*header, "eta, all, in seconds"], lines)


def lever_table(rows: Sequence[Row]) -> str:
    """Return causal losses of levers less those of the recipe that they change and of dense, of the same seed."""
    by_run = {(row["size"], row["data"], row["budget"], row["seed"], row["recipe"]): losses_of(row) for row in rows}
    header = ["tokens", "seed", "recipe", "instead of"]
    header += [f"less {what}, {name}" for what in ("that", "dense") for name in PARTS.values()]
    lines = []
    for lever, changed in LEVERS.items():
        for (*place, recipe), losses in sorted(by_run.items()):
            if recipe == lever:
                others = [by_run.get((*place, other)) for other in (changed, BASELINE)]
                gaps = [f"{losses[part] - other[part]:+.3f}" if other else "" for other in others for part in PARTS]
                lines.append([f"{place[2]}M", str(place[3]), lever, changed, *gaps])
    return table(header, lines)


def cost_table(rows: Sequence[Row]) -> str:
    """Return what a token of each recipe of the smallest size costs, over dense of the same seed and data."""
    header = ["recipe", "active parameters", "all", "MFLOPs a token", "without head", "over dense"]
    dense = {(row["data"], row["seed"]): row for row in rows if row["recipe"] == BASELINE and row["size"] == "0.5M"}
    lines = {}
    for row in sorted(rows, key=lambda row: (row["data"], row["seed"])):
        baseline = dense.get((row["data"], row["seed"]))
        if row["size"] == "0.5M" and baseline and row["recipe"] not in lines:
            millions = [f"{row[name] / 1e6:.3f} M" for name in ("active_parameters", "parameters")]
            flops = [f"{row[name] / 1e6:.3f}" for name in ("flops_a_token", "flops_a_token_without_head")]
            ratio = row["flops_a_token_without_head"] / baseline["flops_a_token_without_head"]
            lines[row["recipe"]] = [row["recipe"], *millions, *flops, f"{ratio:.3f}"]
    return table(header, [lines[recipe] for recipe in sorted(lines)])


def time_over(seconds: Mapping[str, Sequence[float]], recipe: str) -> float | None:
    """Return a recipe's time over dense's, the median over rounds; `None` where it was not measured."""
    if recipe not in seconds:
        return None
    return median(one / other for one, other in zip(seconds[recipe], seconds[BASELINE], strict=True))


def time_table(seconds: Mapping[str, Sequence[float]]) -> str:
    """Return the time of a training step of each recipe, and how it compares with dense's in the same rounds."""
    names = sorted(seconds)
    lines = [[name, f"{median(seconds[name]) * 1e3:.0f}", f"{time_over(seconds, name):.2f}"] for name in names]
    return table(["recipe", "ms", "over dense"], lines)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rows = [list(header), ["---"] * len(header), *map(list, lines)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def draw_losses(rows: Sequence[Row], path: Path) -> None:
    """Draw causal losses over tokens: a panel for each selection of the data, a line for each recipe and seed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # equal figures give equal files
    matplotlib.rcParams["svg.hashsalt"] = "study"
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    numbers = []
    for panel, (data, title) in zip(panels, {"all": "codes of its own", "shipped": "released codes"}.items()):
        runs: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            at = (row["size"], row["data"], row["learning_rate"])
            if at == ("0.5M", data, LEARNING_RATES["0.5M"]) and row["recipe"] in DRAWN:
                runs[row["recipe"], row["seed"]].append((row["budget"], losses_of(row)["overall"]))
        for (recipe, seed), points in sorted(runs.items()):
            label = recipe if recipe not in [line.get_label() for line in panel.lines] else None
            points = sorted(points)
            panel.plot(*zip(*points), "o-", markersize=3, linewidth=1, color=f"C{DRAWN.index(recipe)}", label=label)
            numbers.append((data, recipe, seed, [f"{budget} {loss:.3f}" for budget, loss in points]))
        panel.set(title=f"{title}, a line for each seed", xlabel="million tokens", xscale="log")
        panel.set_xticks([10, 20, 40, 100], ["10", "20", "40", "100"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0].set_ylabel(f"causal loss on `{SPLIT}`, nats")
    # tells a figure of other numbers from this one, whatever version of matplotlib drew it
    digest = f"numbers {hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]}"
    figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": digest})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
