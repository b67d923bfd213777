# SPDX-License-Identifier: Apache-2.0
"""Compares trainings with and without mixture of depths: training FLOPs, causal loss, and what causality costs."""

from collections.abc import Sequence

from emoji_recipe.depth_selection import watched_depth
from modeling_moma.training.measures import EQUAL_FLOPS, EXPERT_CHOICE, LOSSES, gaps, held_out_loss
from modeling_moma.training.tables import markdown_table, spread, with_spread


CAUSAL = "causal (threshold)"
# experts stay causal
DEPTH_EXPERT_CHOICE = EXPERT_CHOICE.replace("expert_choice", "expert_choice in depth layers alone")

# largest gap that a model with depth shall have
AIM_GAP = 0.005

_SIDES = {"without": "without depth", "with_depth": "with depth"}


def measure(model, processor, examples: list[dict], batch_size: int) -> dict:
    """
    Held-out losses of a model under its causal routing and under top-k of the batch.

    Args:
        model: in eval mode, with depth layers or without.
        processor: its tokenizer pads.
        examples: `input_ids` each.
        batch_size: examples at once, which compete with one another under top-k.

    Returns:
        `dict`: `parameters`, `active_parameters`; `loss` and `gap` by routing (all routers under top-k, and with
        depth layers those alone); with depth layers also `layers`: what each chose under `threshold`.
    """
    config = model.config

    def loss(routing, depth_routing, name):
        return held_out_loss(model, processor, examples, batch_size, routing, f"loss: {name}", depth_routing)

    result = {"parameters": config.num_parameters(), "active_parameters": config.num_parameters(active=True)}
    losses = {}
    if config.depth_layers:
        with watched_depth(model) as tallies:
            losses[CAUSAL] = loss("threshold", "threshold", "threshold")
        result["layers"] = [{"layer": layer, **tally.describe(config.modalities)} for layer, tally in tallies.items()]
        losses[DEPTH_EXPERT_CHOICE] = loss("threshold", "expert_choice", "depth alone expert_choice")
    else:
        losses[CAUSAL] = loss("threshold", None, "threshold")
    losses[EXPERT_CHOICE] = loss("expert_choice", None, "expert_choice")
    result["loss"] = losses
    result["gap"] = {name: gaps(losses[CAUSAL], oracle) for name, oracle in losses.items() if name != CAUSAL}
    return result


def compare(without: Sequence[dict], with_depth: Sequence[dict]) -> dict:
    """
    Means and spreads of both sides, and who wins.

    Args:
        without: results of `training_of` and [`measure`] together, one for each seed.
        with_depth: the same of the models with depth layers, in the order of the seeds.

    Returns:
        `loss` and `gap` of each side by routing as `spread`; `flops_ratio` (with over without) and whether all are
        `equal_flops`; `difference` (with minus without) of each causal loss with its `winner` in the mean and the
        number of `seeds_for_winner`.

    Raises:
        ValueError: the sides have different seeds.
    """
    seeds = [[run["seed"] for run in side] for side in (without, with_depth)]
    if seeds[0] != seeds[1]:
        raise ValueError(f"the runs without depth have the seeds {seeds[0]}, those with depth {seeds[1]}: not pairs.")
    summary = {}
    for side, runs in (("without", without), ("with_depth", with_depth)):
        summary[side] = {
            part: {
                routing: {name: spread([run[part][routing][name] for run in runs]) for name in LOSSES}
                for routing in runs[0][part]
            }
            for part in ("loss", "gap")
        }
    ratios = [depth["flops"] / plain["flops"] for plain, depth in zip(without, with_depth)]
    summary["flops_ratio"] = spread(ratios)
    summary["equal_flops"] = all(abs(ratio - 1) <= EQUAL_FLOPS for ratio in ratios)
    summary["difference"] = {}
    for name in LOSSES:
        values = [
            depth["loss"][CAUSAL][name] - plain["loss"][CAUSAL][name] for plain, depth in zip(without, with_depth)
        ]
        difference = spread(values)
        sign = -1 if difference["mean"] < 0 else 1
        summary["difference"][name] = {
            **difference,
            "winner": _SIDES["with_depth" if sign < 0 else "without"],
            "seeds_for_winner": sum(value * sign > 0 for value in values),
        }
    summary["seeds"] = len(without)
    summary["layers"] = _layers(with_depth)
    return summary


def _layers(runs):
    result = []
    for parts in zip(*[run["layers"] for run in runs], strict=True):
        layer = {"layer": parts[0]["layer"], "load": spread([part["load"] for part in parts])}
        for key in ("load_by_modality", "mix_of_chosen"):
            layer[key] = {name: spread([part[key][name] for part in parts]) for name in parts[0][key]}
        layer["error_rate"] = spread([part["error_rate"] for part in parts])
        result.append(layer)
    return result


def verdict(summary: dict) -> str:
    """One sentence for each loss: who is better, and whether the FLOPs were equal; then the gap against its aim."""
    ratio = with_spread(summary["flops_ratio"], 3)
    head = f"Training FLOPs with depth over those without: {ratio}"
    if not summary["equal_flops"]:
        head += f", further apart than {100 * EQUAL_FLOPS:g} %: no verdict at equal FLOPs"
    lines = [head + "."]
    for name, title in LOSSES.items():
        part = summary["difference"][name]
        if part["mean"] == 0:
            lines.append(f"Causal {title} loss: equal.")
            continue
        lines.append(
            f"Causal {title} loss: better {part['winner']}, for {part['seeds_for_winner']} of {summary['seeds']} "
            f"seeds; with minus without {with_spread(part)} nats."
        )
    for routing, gap in summary["with_depth"]["gap"].items():
        reached = "reached" if gap["overall"]["mean"] <= AIM_GAP else "not reached"
        lines.append(
            f"Causal loss with depth lies above that under {routing} by {with_spread(gap['overall'], 2, 100, ' %')}; "
            f"aim of at most {100 * AIM_GAP:g} %: {reached}."
        )
    return "\n".join(f"- {line}" for line in lines)


def comparison_report(report: dict) -> str:
    """The report of scripts/compare_depth.py as Markdown."""
    summary = report["summary"]
    loss_rows, gap_rows = [], []
    for side, title in _SIDES.items():
        for run in report["runs"][side]:
            for routing, loss in run["loss"].items():
                numbers = [f"{loss[name]:.4f}" for name in LOSSES]
                loss_rows.append([f"{title}, {routing}", str(run["seed"]), f"{run['flops']:.3e}", *numbers])
            for routing, gap in run["gap"].items():
                numbers = [f"{100 * gap[name]:.2f} %" for name in LOSSES]
                gap_rows.append([f"{title}, to {routing}", str(run["seed"]), *numbers])
        for routing, loss in summary[side]["loss"].items():
            numbers = [with_spread(loss[name]) for name in LOSSES]
            loss_rows.append([f"**{title}, {routing}**", "mean", "", *numbers])
        for routing, gap in summary[side]["gap"].items():
            numbers = [with_spread(gap[name], 2, 100, " %") for name in LOSSES]
            gap_rows.append([f"**{title}, to {routing}**", "mean", *numbers])
    tables = [
        markdown_table(["nats per target token", "seed", "training FLOPs", *LOSSES.values()], loss_rows),
        markdown_table(["gap, (causal - oracle) / oracle", "seed", *LOSSES.values()], gap_rows),
        layer_table(summary["layers"]),
    ]
    settings = (
        f"{report['examples']} examples of the {report['split']} split, both orders of each picture shuffled "
        f"together, {report['batch_size']} in a batch; losses under expert_choice depend on the batch and see the "
        "future."
    )
    return "\n\n".join([verdict(summary), settings, *tables]) + "\n"


def layer_table(layers: Sequence[dict]) -> str:
    """Markdown table of what the depth layers chose under `threshold`."""
    modalities = list(layers[0]["load_by_modality"])

    def percent(part):
        return with_spread(part, 1, 100, " %")

    rows = [
        [
            str(layer["layer"]),
            *(percent(part) for part in (layer["load"], *layer["load_by_modality"].values())),
            *(percent(part) for part in layer["mix_of_chosen"].values()),
            percent(layer["error_rate"]),
        ]
        for layer in layers
    ]
    loads = [f"load, {LOSSES[name]}" for name in modalities]
    mixes = [f"{LOSSES[name]} among chosen" for name in modalities]
    return markdown_table(["layer, threshold", "load", *loads, *mixes, "differs from batch top-k"], rows)
