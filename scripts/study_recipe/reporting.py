# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of the study, from its rows alone."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from modeling_moma.errors_moma import InputError

from .grid import CLAIMED, FRESH_SEEDS, LEVERS, SIZES, TWELFTHS
from .rows import NESTED


# columns of a table: what is measured, and its name
PARTS = {"overall": "all", "image": "image", "text": "text"}
BASELINE = "dense"
# groups of experts
GROUPS = ("image", "text", "all")
# kinds of a loss: of the training batches, of held-out documents with experts that see the batch, and causal
TRAINING, ORACLE, CAUSAL = "training", "oracle", "causal"

# a law of mixtures of experts (arXiv 2502.05172): loss of E experts, N active parameters and D tokens
LAW_OF_PARAMETERS = (35.91, -0.2285, -0.1889, 0.0098)
LAW_OF_TOKENS = (35.98, 0.5529, -0.1775, -0.0259)
LAW_FLOOR = 1.3637
LAW_SMALLEST, LAW_LARGEST = 2.0732, 290.45


def opened(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the file with its JSON read; what it lacks is `None`."""
    return {name: json.loads(value) if name in NESTED and value else value for name, value in row.items()}


def losses_of(row: Mapping[str, Any], kind: str, split: str) -> dict[str, float] | None:
    """Return a row's losses in nats a target, the mean over the tokens of the training's mixture.

    Args:
        row (`Mapping`):
            an opened row.
        kind (`str`):
            `"training"`, `"oracle"` or `"causal"`. The first is the mean over the last million tokens. Without routers
            that see the batch the oracle's is the causal loss.
        split (`str`):
            of held-out documents; the training's loss has none.

    Returns:
        `dict[str, float] | None`: `overall`, `text`, `image`; `None` where they were not measured.
    """
    shares = row["counts"]["shares"]
    if kind == TRAINING:
        last = next((point for point in reversed(row["curve"]) if "image_loss" in point), None)
        if last is None:
            return None
        by_modality = {name: last[f"{name}_loss"] for name in ("image", "text")}
        weights = row["counts"]["tokens"]
        return {**by_modality, "overall": sum(weights[name] * by_modality[name] for name in by_modality)}
    found = {entry["routing"] for entry in row["losses"]}
    routing = kind if kind in found else CAUSAL
    sums, weights = defaultdict(float), defaultdict(float)
    for entry in row["losses"]:
        if (entry["split"], entry["routing"]) == (split, routing) and entry["modality"] in ("image", "text"):
            weight = shares[entry["source"]][entry["modality"]]
            for part in (entry["modality"], "overall"):
                sums[part] += weight * entry["loss"]
                weights[part] += weight
    return {part: sums[part] / weights[part] for part in sums if weights[part]} or None


def tokens_needed(curve: Sequence[tuple[float, float]], loss: float) -> float:
    """Return the tokens at which a curve reaches a loss, linear in their logarithm between and beyond its points.

    Args:
        curve (`Sequence[tuple[float, float]]`):
            two or more pairs of tokens and loss.
        loss (`float`):
            in nats.

    Raises:
        ValueError: the curve has fewer points, or does not fall.
    """
    points = sorted(curve)
    if len(points) < 2:
        raise InputError(f"`curve` has {len(points)} points: two are needed to tell how it falls.")
    falls = [(before, after) for before, after in zip(points, points[1:])]
    if any(after[1] >= before[1] for before, after in falls):
        raise InputError(f"`curve` does not fall: {points}.")
    # beyond its ends the nearest piece goes on
    before, after = next((piece for piece in falls if loss >= piece[1][1]), falls[-1])
    share = (before[1] - loss) / (before[1] - after[1])
    return math.exp(math.log(before[0]) + share * (math.log(after[0]) - math.log(before[0])))


@dataclass(frozen=True)
class Saving:
    """What dense needs over what a recipe needed.

    Args:
        tokens (`float`):
            eta: dense's tokens over the recipe's for one loss, times dense's training FLOPs a token over the recipe's.
        without_head (`float`):
            the same where the head's FLOPs do not count.
        uncorrected (`float`):
            the same for equal tokens instead of equal FLOPs.
        is_beyond (`bool`):
            whether that many tokens lie outside dense's budgets, and the line of the nearest two was drawn on.
    """

    tokens: float
    without_head: float
    uncorrected: float
    is_beyond: bool


def saving(row: Mapping[str, Any], dense: Sequence[Mapping[str, Any]], kind: str, split: str, part: str) -> Saving:
    """Return what a row saves over the dense rows of its size and seed.

    Args:
        row (`Mapping`):
            an opened row.
        dense (`Sequence[Mapping]`):
            of two budgets or more.
        kind (`str`):
            of the loss, see [`losses_of`].
        split (`str`):
            see [`losses_of`].
        part (`str`):
            `overall`, `text` or `image`.
    """
    curve = [(float(other["tokens"]), _part(other, kind, split, part)) for other in dense]
    needed = tokens_needed(curve, _part(row, kind, split, part))
    ratio = needed / row["tokens"]
    flops, without_head = (dense[0][name] / row[name] for name in ("flops_a_token", "flops_a_token_without_head"))
    is_beyond = not min(curve)[0] <= needed <= max(curve)[0]
    return Saving(ratio * flops, ratio * without_head, ratio, is_beyond)


def _part(row: Mapping[str, Any], kind: str, split: str, part: str) -> float:
    losses = losses_of(row, kind, split)
    if losses is None:
        raise InputError(f"{row['run']}, {row['budget']}M: there is no {kind} loss of {split}.")
    return losses[part]


def partners(row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the dense rows that a row is compared with: of its size, seed, data and rate, one for each budget.

    None where dense has not come as far: beyond the budgets of both, its line of the last doubling says little.
    """
    same = ("size", "seed", "data", "learning_rate")
    dense = [other for other in rows if other["recipe"] == BASELINE and all(other[name] == row[name] for name in same)]
    return dense if any(other["budget"] >= row["budget"] for other in dense) else []


def spread(values: Sequence[float], digits: int) -> str:
    """Return a mean with the standard deviation over seeds, where there are several."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{digits}f}"


def grouped(rows: Iterable[Mapping[str, Any]]) -> dict[tuple, list[Mapping[str, Any]]]:
    """Return the seeds of each recipe and budget."""
    groups: dict[tuple, list] = defaultdict(list)
    for row in rows:
        groups[row["size"], row["data"], row["budget"], row["learning_rate"], row["recipe"]].append(row)
    return dict(sorted(groups.items()))


def loss_table(rows: Sequence[Mapping[str, Any]], split: str) -> str:
    """Return causal losses of a split, a line for each recipe and budget."""
    header = ["size", "data", "tokens", "rate", "recipe", "seeds", *PARTS.values()]
    lines = []
    for (size, data, budget, rate, recipe), seeds in grouped(rows).items():
        losses = [_losses(row, CAUSAL, split) for row in seeds]
        columns = [spread([entry[part] for entry in losses], 4) for part in PARTS]
        lines.append([size, data, f"{budget}M", f"{rate:g}", recipe, str(len(seeds)), *columns])
    return table(header, lines)


def _losses(row: Mapping[str, Any], kind: str, split: str) -> dict[str, float]:
    return {part: _part(row, kind, split, part) for part in PARTS}


def saving_table(rows: Sequence[Mapping[str, Any]], split: str, times: Mapping[str, Any] | None = None) -> str:
    """Return eta by three losses, a line for each recipe and budget that dense rows can be compared with.

    Args:
        rows (`Sequence[Mapping]`):
            opened rows.
        split (`str`):
            of held-out documents.
        times (`Mapping`, *optional*):
            of steps, as `scripts/study.py --time` writes them, for a last column: eta where both spend the same
            seconds, not FLOPs.
    """
    header = ["size", "data", "tokens", "recipe", "seeds"]
    header += [f"{kind}, {name}" for kind in (TRAINING, ORACLE, CAUSAL) for name in PARTS.values()]
    header += ["causal, all, without head", "causal, all, in seconds"]
    lines = []
    for (size, data, budget, _, recipe), seeds in grouped(rows).items():
        compared = [(row, partners(row, rows)) for row in seeds if recipe != BASELINE]
        compared = [(row, dense) for row, dense in compared if len(dense) > 1]
        if not compared:
            continue
        columns = []
        for kind in (TRAINING, ORACLE, CAUSAL):
            for part in PARTS:
                columns.append(spread([saving(row, dense, kind, split, part).tokens for row, dense in compared], 2))
        savings = [saving(row, dense, CAUSAL, split, "overall") for row, dense in compared]
        columns.append(spread([each.without_head for each in savings], 2))
        is_timed = times is not None and size == times["size"]
        over_dense = time_over(times["seconds"], recipe, BASELINE) if is_timed else None
        columns.append(spread([each.uncorrected / over_dense for each in savings], 2) if over_dense else "")
        lines.append([size, data, f"{budget}M", recipe, str(len(compared)), *columns])
    return table(header, lines)


def time_over(seconds: Mapping[str, Sequence[float]], recipe: str, baseline: str) -> float | None:
    """Return a recipe's time over that of another, the median over rounds; `None` where either was not measured."""
    if recipe not in seconds or baseline not in seconds:
        return None
    return median(one / other for one, other in zip(seconds[recipe], seconds[baseline], strict=True))


def time_table(times: Mapping[str, Any] | None) -> str:
    """Return the time of a training step of each recipe, and how it compares with dense's in the same rounds."""
    lines = []
    for recipe, seconds in sorted((times or {"seconds": {}})["seconds"].items()):
        over_dense = time_over((times or {})["seconds"], recipe, BASELINE)
        lines.append([recipe, f"{1000 * median(seconds):.0f}", "" if over_dense is None else f"{over_dense:.2f}"])
    return table(["recipe", "milliseconds of a step, median", "over dense, median of rounds"], lines)


def fresh_table(rows: Sequence[Mapping[str, Any]], split: str) -> str:
    """Return by how much the claimed recipe's causal loss differs from others', seed by seed, on fresh seeds alone.

    Args:
        rows (`Sequence[Mapping]`):
            opened rows.
        split (`str`):
            of held-out documents, by which nothing was chosen.
    """
    *others, best = CLAIMED
    header = [
        "size",
        "tokens",
        "seed",
        *(f"{best} less {other}, {part}" for other in others for part in PARTS.values()),
    ]
    by_seed: dict[tuple, dict[int, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for (size, data, budget, rate, recipe), seeds in grouped(rows).items():
        for row in seeds:
            if (
                recipe in CLAIMED
                and data == "all"
                and row["seed"] in FRESH_SEEDS
                and rate == SIZES[size].learning_rate
            ):
                by_seed[size, budget][row["seed"]][recipe] = _losses(row, CAUSAL, split)
    lines = []
    for (size, budget), seeds in by_seed.items():
        whole = {seed: losses for seed, losses in sorted(seeds.items()) if losses.keys() == set(CLAIMED)}
        gaps = {
            seed: [losses[best][part] - losses[other][part] for other in others for part in PARTS]
            for seed, losses in whole.items()
        }
        lines += [[size, f"{budget}M", str(seed), *(f"{gap:+.4f}" for gap in found)] for seed, found in gaps.items()]
        if len(gaps) > 1:
            means = [f"{fmean(column):+.4f} ± {stdev(column):.4f}" for column in zip(*gaps.values(), strict=True)]
            lines.append([size, f"{budget}M", "mean", *means])
    return table(header, lines)


def seed_table(rows: Sequence[Mapping[str, Any]], split: str) -> str:
    """Return the causal eta of each seed by itself, and by how much its losses differ from dense's at that budget.

    Args:
        rows (`Sequence[Mapping]`):
            opened rows.
        split (`str`):
            of held-out documents.
    """
    header = ["size", "data", "tokens", "recipe", "seed", *(f"eta, {part}" for part in PARTS.values())]
    header += [*_gap_header(BASELINE), "dense needs"]
    lines = []
    for (size, data, budget, _, recipe), seeds in grouped(rows).items():
        for row in sorted(seeds, key=lambda row: row["seed"]):
            dense = {other["budget"]: other for other in partners(row, rows)}
            if recipe == BASELINE or len(dense) < 2:
                continue
            savings = [saving(row, [*dense.values()], CAUSAL, split, part) for part in PARTS]
            etas = [f"{each.tokens:.2f}" for each in savings]
            gaps = _gaps(row, [dense.get(budget)], split)
            needed = f"{savings[0].uncorrected * row['tokens'] / 1e6:.0f}M"
            if savings[0].is_beyond:
                needed += f" (has {min(dense)}M to {max(dense)}M)"
            lines.append([size, data, f"{budget}M", recipe, str(row["seed"]), *etas, *gaps, needed])
    return table(header, lines)


def lever_table(rows: Sequence[Mapping[str, Any]], split: str) -> str:
    """Return by how much the causal loss of each lever differs from that of the recipe that it changes, and of dense.

    Args:
        rows (`Sequence[Mapping]`):
            opened rows.
        split (`str`):
            of held-out documents.
    """
    header = ["size", "data", "tokens", "seed", "recipe", "instead of", *_gap_header("that", BASELINE)]
    alike = {(row["recipe"], *_place(row)): row for row in rows}
    lines = []
    for lever, control in LEVERS.items():
        for place, row in sorted((place[1:], row) for place, row in alike.items() if place[0] == lever):
            if (control, *place) not in alike:
                continue
            gaps = _gaps(row, [alike.get((recipe, *place)) for recipe in (control, BASELINE)], split)
            size, data, budget, seed, _ = place
            lines.append([size, data, f"{budget}M", str(seed), lever, control, *gaps])
    return table(header, lines)


def repetition_table(rows: Sequence[Mapping[str, Any]], split: str) -> str:
    """Return by how much causal losses differ where a twelfth of the icons is read twelve times as often.

    Args:
        rows (`Sequence[Mapping]`):
            opened rows.
        split (`str`):
            of held-out documents.
    """
    header = ["size", "data", "tokens", "seed", "recipe", *_gap_header("that of all icons", BASELINE)]
    alike = {(row["recipe"], *_place(row)): row for row in rows}
    lines = []
    for (recipe, size, data, *rest), row in sorted(alike.items()):
        if data in TWELFTHS:
            others = [alike.get(key) for key in ((recipe, size, TWELFTHS[data], *rest), (BASELINE, size, data, *rest))]
            gaps = _gaps(row, others, split)
            lines.append([size, data, f"{row['budget']}M", str(row["seed"]), recipe, *gaps])
    return table(header, lines)


def _gap_header(*others: str) -> list[str]:
    return [f"less {other}, {part}" for other in others for part in PARTS.values()]


def _gaps(row: Mapping[str, Any], others: Sequence[Mapping[str, Any] | None], split: str) -> list[str]:
    """Return by how much a row's causal losses differ from others', part by part; blanks where there is none."""
    own, cells = _losses(row, CAUSAL, split), []
    for other in others:
        losses = None if other is None else _losses(other, CAUSAL, split)
        cells += ["" if losses is None else f"{own[part] - losses[part]:+.3f}" for part in PARTS]
    return cells


def _place(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in ("size", "data", "budget", "seed", "learning_rate"))


def coverage_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the shares of tokens that no expert took, at the end of the training."""
    header = ["size", "data", "tokens", "rate", "recipe", "without an expert, image", "text", "all (one pool)"]
    lines = []
    for (size, data, budget, rate, recipe), seeds in grouped(rows).items():
        last = [next((point for point in reversed(row["curve"]) if _uncovered(point)), {}) for row in seeds]
        shares = [[point[f"{group}_uncovered"] for point in last if f"{group}_uncovered" in point] for group in GROUPS]
        if any(shares):
            cells = [f"{100 * fmean(share):.0f} %" if share else "" for share in shares]
            lines.append([size, data, f"{budget}M", f"{rate:g}", recipe, *cells])
    return table(header, lines)


def _uncovered(point: Mapping[str, float]) -> bool:
    return any(f"{group}_uncovered" in point for group in GROUPS)


def experts_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how many routed experts take a token at inference, by layers from the first, and in their mean."""
    header = ["size", "data", "tokens", "rate", "recipe"]
    header += [f"{name}, {part}" for name in GROUPS[:2] for part in ("mean", "by layer")]
    lines = []
    for (size, data, budget, rate, recipe), seeds in grouped(rows).items():
        numbers: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for entry in (entry for row in seeds for entry in row.get("experts") or ()):
            numbers[entry["modality"]][entry["layer"]].append(entry["causal"])
        if not numbers:
            continue
        cells = []
        for name in GROUPS[:2]:
            means = [fmean(values) for _, values in sorted(numbers[name].items())]
            cells += [f"{fmean(means):.2f}", " / ".join(f"{mean:.2f}" for mean in means)] if means else ["", ""]
        lines.append([size, data, f"{budget}M", f"{rate:g}", recipe, *cells])
    return table(header, lines)


def cost_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what a token of each recipe costs, over dense of the same seed, since documents differ between seeds."""
    header = ["size", "data", "recipe", "active", "all", "embeddings", "MFLOPs a token", "without head", "over dense"]
    lines = []
    dense = {(row["size"], row["data"], row["seed"]): row for row in rows if row["recipe"] == BASELINE}
    by_recipe = defaultdict(list)
    for row in rows:
        if (row["size"], row["data"], row["seed"]) in dense:
            by_recipe[row["size"], row["data"], row["recipe"]].append(row)
    for (size, data, recipe), seeds in sorted(by_recipe.items()):
        row = min(seeds, key=lambda entry: entry["seed"])
        millions = [f"{row[name] / 1e6:.3f} M" for name in ("active_parameters", "parameters", "embeddings")]
        flops = [f"{row[name] / 1e6:.3f}" for name in ("flops_a_token", "flops_a_token_without_head")]
        baseline = dense[size, data, row["seed"]]
        ratio = row["flops_a_token_without_head"] / baseline["flops_a_token_without_head"]
        lines.append([size, data, recipe, *millions, *flops, f"{ratio:.3f}"])
    return table(header, lines)


def law_loss(experts: int, parameters: float, tokens: float) -> float:
    """Return the loss by the law, in its own units.

    Args:
        experts (`int`):
            number of experts `E`, 1 for a dense model.
        parameters (`float`):
            active ones `N`, with the embeddings, as the law counts them.
        tokens (`float`):
            `D`.
    """
    transformed = 1 / (1 / (experts - 1 + 1 / (1 / LAW_SMALLEST - 1 / LAW_LARGEST)) + 1 / LAW_LARGEST)
    total = LAW_FLOOR
    for (scale, of_experts, exponent, slope), count in (
        (LAW_OF_PARAMETERS, parameters),
        (LAW_OF_TOKENS, tokens),
    ):
        total += scale * transformed**of_experts * count ** (exponent + slope * math.log(transformed))
    return total


def law_parameters(row: Mapping[str, Any]) -> float:
    """Return a row's active parameters as the law counts them, with the embeddings, which are the head's too."""
    return row["active_parameters"] + row["embeddings"]


def law_saving(experts: int, parameters: float, tokens: float) -> float:
    """Return eta by the law: the tokens that a dense model needs for what `tokens` give experts, over those."""
    wanted = law_loss(experts, parameters, tokens)
    needed = _solve(lambda others: law_loss(1, parameters, others) < wanted, tokens / 1e4, tokens * 1e4)
    return needed / tokens


def law_tokens(experts: int, parameters: float, value: float) -> float:
    """Return the tokens at which eta has a value by the law.

    Args:
        experts (`int`):
            see [`law_loss`].
        parameters (`float`):
            see [`law_loss`].
        value (`float`):
            of eta.
    """
    return _solve(lambda tokens: law_saving(experts, parameters, tokens) > value, 1e4, 1e16)


def _solve(is_beyond: Callable[[float], bool], low: float, high: float) -> float:
    """Return where a condition begins to hold between two numbers, on a scale of logarithms."""
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_beyond(middle) else (middle, high)
    return low


# a node of 8 GPUs, at what large dense trainings reach on each, an assumption and no measurement
NODE_FLOPS = 8 * 4e14
PLANNED_PARAMETERS = (1e6, 1e7, 1e8, 4.35e8)
PLANNED_SAVINGS = (1.0, 1.3, 2.0, 3.7)


def plan_table() -> str:
    """Return the tokens by which the law expects values of eta, and the days that a node takes for both models."""
    header = ["active parameters, with embeddings", "eta", "tokens", "by active parameter"]
    header += ["FLOPs of both runs", "days on 8 GPUs"]
    lines = []
    for parameters in PLANNED_PARAMETERS:
        for value in PLANNED_SAVINGS:
            tokens = law_tokens(4, parameters, value)
            # dense has to reach the loss, for which it needs `value` times the tokens
            flops = 6 * parameters * tokens * (1 + value)
            days = flops / NODE_FLOPS / 86400
            cells = [f"{parameters / 1e6:g} M", f"{value:g}", f"{tokens / 1e9:.3g} B", f"{tokens / parameters:.0f}"]
            lines.append([*cells, f"{flops:.1e}", f"{days:.2g}"])
    return table(header, lines)


def slope_table(rows: Sequence[Mapping[str, Any]], split: str) -> str:
    """Return eta over tokens by active parameter, with what the law gives for four experts."""
    header = ["size", "data", "recipe", "tokens by active parameter", "eta, causal, all", "law, 4 experts"]
    lines = []
    for (size, data, budget, _, recipe), seeds in grouped(rows).items():
        compared = [(row, partners(row, rows)) for row in seeds if recipe != BASELINE]
        compared = [(row, dense) for row, dense in compared if len(dense) > 1]
        if compared:
            row = compared[0][0]
            values = [saving(entry, dense, CAUSAL, split, "overall").tokens for entry, dense in compared]
            predicted = law_saving(4, law_parameters(row), row["tokens"])
            ratio = row["tokens"] / row["active_parameters"]
            cells = [f"{ratio:.0f}", spread(values, 2), f"{predicted:.2f}"]
            lines.append([f"{size}, {budget}M", data, recipe, *cells])
    return table(header, lines)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, or a word that nothing is finished yet."""
    lines = list(lines)
    if not lines:
        return "Nothing is finished yet."
    rows = [list(header), ["---"] * len(header), *map(list, lines)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def held_out_curve(row: Mapping[str, Any]) -> dict[float, dict[str, float]]:
    """Return causal losses on `validation` along a run's trunk, by tokens and part.

    They are those of the few documents that every curve has, the mean over the tokens of the mixture.

    Args:
        row (`Mapping[str, Any]`):
            an opened row.
    """
    found = {}
    for point in row["curve"]:
        if not math.isclose(point.get("learning_rate", 0.0), row["learning_rate"]):
            continue
        sums, weights = defaultdict(float), defaultdict(float)
        for source, shares in row["counts"]["shares"].items():
            for modality, share in shares.items():
                loss = point.get(f"eval_{source}_{modality}_loss")
                if share and loss is not None:
                    for part in (modality, "overall"):
                        sums[part] += share * loss
                        weights[part] += share
        if sums:
            found[point["tokens"]] = {part: sums[part] / weights[part] for part in sums}
    return found


def longest(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Return the row of the largest budget, `None` where there is no row."""
    return max(rows, key=lambda row: row["budget"], default=None)


# million tokens
TICKS = (3, 5, 10, 20, 40, 100)
# size of the runs that are drawn, the others stand in tables
DRAWN_SIZE = "0.5M"


def _drawn(rows: Iterable[Mapping[str, Any]], data: str) -> list[Mapping[str, Any]]:
    drawn = (DRAWN_SIZE, data, SIZES[DRAWN_SIZE].learning_rate)
    return [row for row in rows if (row["size"], row["data"], row["learning_rate"]) == drawn]


def draw_gaps(rows: Sequence[Mapping[str, Any]], path: Path, data: str) -> None:
    """Draw by how much each recipe's causal loss is below or above dense's along their trunks, a line for each seed.

    Args:
        rows (`Sequence[Mapping]`):
            opened rows.
        path (`Path`):
            the SVG.
        data (`str`):
            selection of the data of the runs that are drawn.
    """
    figure, panels = _panels(sharey=False)
    runs = defaultdict(list)
    for row in _drawn(rows, data):
        runs[row["recipe"], row["seed"]].append(row)
    recipes = dict.fromkeys(recipe for recipe, _ in runs)
    # there are ten colours; what comes after them is dashed
    styles = {recipe: (f"C{place}", "-" if place < 10 else "--") for place, recipe in enumerate(recipes)}
    for (recipe, _), branches in sorted(runs.items()):
        row = longest(branch for branch in branches if partners(branch, rows))
        dense = row and longest(partners(row, rows))
        if recipe == BASELINE or dense is None:
            continue
        curve, other = held_out_curve(row), held_out_curve(dense)
        # the first two million tokens differ by much more than all that follows
        tokens = [count for count in curve if count in other and count > 2.5e6]
        for panel, part in zip(panels, PARTS):
            gaps = [curve[count][part] - other[count][part] for count in tokens]
            label = recipe if recipe not in [line.get_label() for line in panel.lines] else None
            colour, style = styles[recipe]
            millions = [count / 1e6 for count in tokens]
            panel.plot(millions, gaps, linewidth=1, color=colour, linestyle=style, label=label)
    panels[0].set_ylabel("causal loss less dense's, nats")
    _save(figure, panels, path, level=0.0)


def draw_savings(rows: Sequence[Mapping[str, Any]], split: str, path: Path) -> None:
    """Draw eta over tokens, a panel for each part and a line for each recipe, and the law's line for four experts.

    Circles are empty where what dense needs lies outside its budgets.

    Args:
        rows (`Sequence[Mapping]`):
            opened rows.
        split (`str`):
            of the causal losses.
        path (`Path`):
            the SVG.
    """
    figure, panels = _panels(sharey=True)
    by_recipe: dict[str, dict[int, list[Any]]] = defaultdict(dict)
    drawn = _drawn(rows, "all")
    for (_, _, budget, _, recipe), seeds in grouped(drawn).items():
        if recipe != BASELINE:
            compared = [(row, dense) for row in seeds if len(dense := partners(row, rows)) > 1]
            if compared:
                by_recipe[recipe][budget] = compared
    budgets_drawn = set()
    for panel, part in zip(panels, PARTS):
        for recipe, budgets in by_recipe.items():
            savings = {
                budget: [saving(row, dense, CAUSAL, split, part) for row, dense in compared]
                for budget, compared in sorted(budgets.items())
            }
            budgets_drawn |= savings.keys()
            etas = {budget: fmean(each.tokens for each in seeds) for budget, seeds in savings.items()}
            (line,) = panel.plot(*zip(*etas.items()), "o-", markersize=4, linewidth=1, label=recipe)
            line.set_markerfacecolor("white")
            within = [budget for budget, seeds in savings.items() if not any(each.is_beyond for each in seeds)]
            panel.plot(within, [etas[budget] for budget in within], "o", markersize=4, color=line.get_color())
    if budgets_drawn:
        low, high = min(budgets_drawn), max(budgets_drawn)
        tokens = [low * (high / low) ** (step / 20) for step in range(21)]
        parameters = fmean(map(law_parameters, drawn))
        predicted = [law_saving(4, parameters, millions * 1e6) for millions in tokens]
        panels[0].plot(tokens, predicted, linestyle="--", color="grey", linewidth=1, label="law, 4 experts")
    panels[0].set_ylabel("eta over dense, causal")
    _save(figure, panels, path, level=1.0)


def _panels(sharey: bool) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # equal figures give equal files
    matplotlib.rcParams["svg.hashsalt"] = "study"
    return pyplot.subplots(1, len(PARTS), figsize=(11, 3.6), sharey=sharey, layout="constrained")


def _save(figure: Any, panels: Any, path: Path, level: float) -> None:
    from matplotlib import pyplot

    for panel, title in zip(panels, PARTS.values(), strict=True):
        panel.axhline(level, color="black", linewidth=0.8)
        panel.set(title=title, xlabel="million tokens", xscale="log")
        low, high = panel.get_xlim()
        ticks = [tick for tick in TICKS if low <= tick <= high]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    if labels:
        panels[-1].legend(handles, labels, fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, metadata={"Date": None, "Creator": None, "Description": _digest(panels)})
    pyplot.close(figure)


def _digest(panels: Any) -> str:
    """Return what tells a figure of other numbers from this one, whatever version of matplotlib drew it."""
    lines = [
        [line.get_label(), *(f"{value:.3f}" for pair in line.get_xydata() for value in pair)]
        for panel in panels
        for line in panel.lines
    ]
    return f"numbers {hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]}"
