# SPDX-License-Identifier: Apache-2.0
"""Compares trainings from scratch with those of an upcycled seed, at equal training FLOPs (MoMa section 2.5)."""

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean

from modeling_moma.training.measures import EQUAL_FLOPS, EXPERT_CHOICE, LOSSES, held_out_loss
from modeling_moma.training.runs import savings
from modeling_moma.training.tables import markdown_table, spread, with_spread


CAUSAL = "causal"
# told apart by the colour-blind, and by their dashes in print
_COLORS = ("black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_DASHES = ("-", "--", "-.", ":")
SCRATCH = "from scratch"

_SETTINGS = {
    "learning_rate": "peak learning rate",
    "warmup_steps": "warm-up steps",
    "gumbel_noise": "Gumbel noise",
    "gumbel_noise_steps": "falling over steps",
    "normalize_gates": "normalized gates",
}


def measure(model, processor, examples: list[dict], batch_size: int) -> dict:
    """
    Held-out losses of a model under its own causal routing, and under top-k of the batch.

    Args:
        model: in eval mode.
        processor: its tokenizer pads.
        examples: `input_ids` each.
        batch_size: examples at once, which compete with one another under top-k.

    Returns:
        `training_routing`, `inference_routing` and the settings of the config that upcycling touches; `loss` by
        routing, `CAUSAL` and `EXPERT_CHOICE`.
    """
    config = model.config
    names = ("training_routing", "inference_routing", "gumbel_noise", "gumbel_noise_steps", "normalize_gates")
    return {
        **{name: getattr(config, name) for name in names},
        "loss": {
            CAUSAL: held_out_loss(model, processor, examples, batch_size, description=f"loss: {CAUSAL}"),
            EXPERT_CHOICE: held_out_loss(
                model, processor, examples, batch_size, "expert_choice", "loss: expert_choice"
            ),
        },
    }


def by_seed_length(scratch: Sequence[dict], upcycled: Sequence[dict]) -> dict[int, list[dict]]:
    """
    Sorts runs by the length of their seed, so that those of each length pair up with those from scratch.

    Args:
        scratch: results of `training_of`, runs from scratch.
        upcycled: runs that began with a seed.

    Returns:
        Runs by steps of their seed, ascending, 0 from scratch; each in the order of `seed`.

    Raises:
        ValueError: a run is on the wrong side, or a length lacks a seed that another one has.
    """
    groups = {0: []}
    for run in scratch:
        if run["first_step"]:
            raise ValueError(f"`scratch` has {run['folder']}, which began at step {run['first_step']}: wrong side?")
        groups[0].append(run)
    for run in sorted(upcycled, key=lambda run: run["first_step"]):
        if not run["first_step"]:
            raise ValueError(
                f"`upcycled` has {run['folder']}, whose run.json knows no `first_step` above 0: was the training "
                "started from scratch, or from a folder without trainer_state.json?"
            )
        groups.setdefault(run["first_step"], []).append(run)
    groups = {length: sorted(runs, key=lambda run: run["seed"]) for length, runs in groups.items()}
    seeds = {length: [run["seed"] for run in runs] for length, runs in groups.items()}
    for length, found in seeds.items():
        if found != seeds[0] or len(set(found)) < len(found):
            raise ValueError(
                f"the runs from scratch have the random seeds {seeds[0]}, those upcycled after {length} steps "
                f"{found}: give one run of each seed for every length."
            )
    return groups


def compare(groups: dict[int, list[dict]]) -> dict:
    """
    Means and spreads for each length of the seed, and their differences to training from scratch.

    Args:
        groups: from [`by_seed_length`], with what [`measure`] found.

    Returns:
        `dict`: `seeds`, `steps`, `inference_routing`, `training_routing`; `lengths`, one entry for each length of the
        seed: `first_step`, `share` (of the steps), `loss` by routing as `spread`, and but from scratch `flops_ratio`
        (over from scratch), `equal_flops`, `eta` by seed, and `difference` (minus from scratch) of each causal loss
        with the number of `seeds_better`; `best`, by the name of the loss: the `first_step` with the lowest mean among
        the upcycled.

    Raises:
        ValueError: the runs infer with different routings, or take different numbers of steps.
    """
    scratch = groups[0]
    same = {}
    for name in ("steps", "inference_routing", "training_routing"):
        values = sorted({run[name] for runs in groups.values() for run in runs})
        if len(values) > 1:
            raise ValueError(f"the runs have {name} {values}: compare runs that share it.")
        same[name] = values[0]
    lengths = []
    for first_step, runs in groups.items():
        part = {"first_step": first_step, "share": first_step / same["steps"]}
        part["loss"] = {
            routing: {name: spread([run["loss"][routing][name] for run in runs]) for name in LOSSES}
            for routing in (CAUSAL, EXPERT_CHOICE)
        }
        if first_step:
            ratios = [run["flops"] / plain["flops"] for plain, run in zip(scratch, runs, strict=True)]
            part["flops_ratio"] = spread(ratios)
            part["equal_flops"] = all(abs(ratio - 1) <= EQUAL_FLOPS for ratio in ratios)
            part["eta"] = [savings(plain, run) for plain, run in zip(scratch, runs, strict=True)]
            part["difference"] = {name: _difference(scratch, runs, name) for name in LOSSES}
        lengths.append(part)
    upcycled = lengths[1:]
    best = {name: min(upcycled, key=lambda part: part["loss"][CAUSAL][name]["mean"])["first_step"] for name in LOSSES}
    return {"seeds": len(scratch), **same, "lengths": lengths, "best": best}


def _difference(scratch, runs, name):
    values = [run["loss"][CAUSAL][name] - plain["loss"][CAUSAL][name] for plain, run in zip(scratch, runs)]
    return {**spread(values), "seeds_better": sum(value < 0 for value in values)}


def verdict(summary: dict) -> str:
    """Who wins each causal loss and by how much, whether that is more than noise, and whether the aim is reached."""
    lengths = {part["first_step"]: part for part in summary["lengths"]}
    upcycled = summary["lengths"][1:]
    lines = []
    ratios = [part["flops_ratio"]["mean"] for part in upcycled]
    head = f"Training FLOPs, the seed's included, over those from scratch: {min(ratios):.4f} to {max(ratios):.4f}"
    if not all(part["equal_flops"] for part in upcycled):
        head += f", further apart than {100 * EQUAL_FLOPS:g} %: no verdict at equal FLOPs"
    lines.append(head + ".")
    for name, title in LOSSES.items():
        part = lengths[summary["best"][name]]
        lines.append(f"Causal {title} loss: {_sentence(summary, part, name)}")
    best = lengths[summary["best"]["overall"]]["difference"]["overall"]["mean"]
    reached = "reached" if best <= 0 else "not reached"
    lines.append(f"Aim, the best upcycled one at least as good as from scratch in the overall causal loss: {reached}.")
    return "\n".join(f"- {line}" for line in lines)


def _sentence(summary, part, name):
    difference = part["difference"][name]
    plain = summary["lengths"][0]["loss"][CAUSAL][name]
    amount = f"{abs(difference['mean']):.4f} nats"
    losses = f"{with_spread(part['loss'][CAUSAL][name])} against {with_spread(plain)}"
    seeds = f"better for {difference['seeds_better']} of {summary['seeds']} random seeds"
    best = f"the best upcycled one ({_length_name(part)})"
    if difference["mean"] == 0:
        return f"{best} equals training from scratch, {losses} nats."
    word = "better" if difference["mean"] < 0 else "worse"
    text = f"{best} is {amount} {word} than training from scratch ({losses}; {seeds})"
    if plain["std"] is not None and abs(difference["mean"]) <= plain["std"]:
        text += ", no more than runs from scratch differ by their random seed"
    return text + "."


def _length_name(part):
    if not part["first_step"]:
        return SCRATCH
    return f"seed of {part['first_step']} steps, {100 * part['share']:.3g} %"


def settings_of(runs: Sequence[dict]) -> str:
    """How runs were trained, in words; several values where the runs differ."""
    parts = []
    for name, title in _SETTINGS.items():
        values = dict.fromkeys(run[name] for run in runs)
        if any(value not in (None, False, 0, 0.0) for value in values):
            parts.append(f"{title} {' or '.join(str(value) for value in values)}")
    return ", ".join(parts)


def comparison_report(report: dict, plot: str) -> str:
    """
    The report of scripts/compare_upcycling.py as Markdown.

    Args:
        report: what it writes as JSON.
        plot: where [`plot_upcycling`] has drawn, relative to the report.
    """
    summary = report["summary"]
    rows, run_rows = [], []
    for part in summary["lengths"]:
        loss = [with_spread(part["loss"][CAUSAL][name]) for name in LOSSES]
        against_scratch = ["", "", ""]
        if part["first_step"]:
            gains = ", ".join(_eta_text(eta["overall"]) for eta in part["eta"])
            difference = with_spread(part["difference"]["overall"])
            against_scratch = [difference, with_spread(part["flops_ratio"]), gains]
        rows.append([_length_name(part), *loss, *against_scratch])
    for part in summary["lengths"]:
        for run in report["runs"][str(part["first_step"])]:
            for routing, loss in run["loss"].items():
                name = f"{_length_name(part)}, {routing}"
                numbers = [f"{loss[name]:.4f}" for name in LOSSES]
                run_rows.append([name, str(run["seed"]), f"{run['flops']:.4e}", *numbers])
    groups = list(report["runs"].values())
    upcycled = [run for runs in groups[1:] for run in runs]
    settings = (
        f"{report['date']}, `{report['command']}`: {report['examples']} examples of the {report['split']} split, both "
        f"orders of each picture shuffled together, {report['batch_size']} in a batch; {summary['seeds']} "
        f"random seed{'' if summary['seeds'] == 1 else 's'} each, {summary['steps']} steps each, the seed's included; "
        f"mean ± standard deviation. Causal losses are under `{summary['inference_routing']}`. From scratch: "
        f"{settings_of(groups[0])}. Upcycled: {settings_of(upcycled)}."
    )
    head = ["causal loss, nats per target token", *LOSSES.values(), "overall minus scratch", "FLOPs over scratch"]
    eta_note = (
        "FLOPs gain is eta (MoMa footnote 6) of the overall causal validation loss, one for each random seed: FLOPs "
        "from scratch over those at which the upcycled run first has its loss; `<` where it never has."
    )
    if any(run["gumbel_noise"] for run in upcycled):
        eta_note += " Training losses of upcycled runs, in the picture, include the noise on their routers."
    losses_head = ["loss, nats per target token", "random seed", "training FLOPs", *LOSSES.values()]
    sections = [
        "# Upcycling against training from scratch",
        verdict(summary),
        settings,
        markdown_table([*head, "FLOPs gain"], rows),
        eta_note,
        f"![Losses over training FLOPs, and over the length of the seed]({plot})",
        markdown_table(losses_head, run_rows),
    ]
    return "\n\n".join(sections) + "\n"


def _eta_text(eta):
    return {"exact": "", "at_most": "<", "at_least": ">="}[eta["bound"]] + f"{eta['value']:.2f}x"


def _mean_curve(runs, name, first_step, last_step=None):
    """FLOPs and mean losses at the steps after `first_step` (up to `last_step`) that all runs have logged."""
    curves = [{point["step"]: point for point in run["training_curve"]} for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    steps = [step for step in steps if step > first_step and (last_step is None or step <= last_step)]
    return (
        [fmean(curve[step]["flops"] for curve in curves) for step in steps],
        [fmean(curve[step][name] for curve in curves) for step in steps],
    )


def plot_upcycling(groups: dict[int, list[dict]], summary: dict, path: str | Path) -> None:
    """
    Draws, for each of `LOSSES`, the training losses over training FLOPs, and the final causal loss over the length of
    the seed (MoMa figure 6).

    Args:
        groups: as given to [`compare`].
        summary: its result.
        path: the PNG.
    """
    # the extra `train` brings it
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(len(LOSSES), 2, figsize=(11, 10), layout="constrained", squeeze=False)
    for (curves, ends), (name, title) in zip(rows, LOSSES.items(), strict=True):
        tokens = "all tokens" if name == "overall" else f"{title} tokens"
        _draw_curves(curves, groups, summary, name)
        curves.set(title=f"{tokens}, training")
        curves.set(xlabel="training FLOPs, the seed's included", ylabel="training loss (nats per token)")
        _draw_ends(ends, groups, summary, name)
        ends.set(title=f"{tokens}, held out")
        ends.set(xlabel="length of the seed (% of the steps)", ylabel="final causal loss (nats per token)")
        for panel in (curves, ends):
            panel.grid(alpha=0.3)
    for column in range(2):
        rows[0][column].legend(fontsize="small")
    figure.suptitle(
        f"Left: losses under {summary['training_routing']}, as trained"
        + (", which see the future" if summary["training_routing"] == "expert_choice" else "")
        + f". Right: causal losses under {summary['inference_routing']}."
    )
    # without the version in it, equal losses give equal files
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
    pyplot.close(figure)


def _draw_curves(panel, groups, summary, name):
    last_switch = max(groups)
    shown = []
    for color, dashes, part in zip(cycle(_COLORS), cycle(_DASHES), summary["lengths"]):
        flops, losses = _mean_curve(groups[part["first_step"]], name, part["first_step"])
        panel.plot(flops, losses, color=color, linestyle=dashes, linewidth=1.4, label=_length_name(part))
        shown += _mean_curve(groups[part["first_step"]], name, last_switch / 2)[1]
    flops, losses = _mean_curve(groups[last_switch], name, 0, last_switch)
    panel.plot(flops, losses, color="0.6", linewidth=3, zorder=1, label="the seed, one expert per modality")
    # the steep beginning would hide all differences
    if shown and max(shown) > min(shown):
        margin = 0.05 * (max(shown) - min(shown))
        panel.set_ylim(min(shown) - margin, max(shown) + margin)


def _draw_ends(panel, groups, summary, name):
    plain = summary["lengths"][0]["loss"][CAUSAL][name]
    shares = [100 * part["share"] for part in summary["lengths"][1:]]
    parts = [part["loss"][CAUSAL][name] for part in summary["lengths"][1:]]
    panel.axhline(plain["mean"], color="black", label=SCRATCH)
    if plain["std"] is not None:
        span = (plain["mean"] - plain["std"], plain["mean"] + plain["std"])
        panel.axhspan(*span, color="black", alpha=0.12, label=f"{SCRATCH}, ± standard deviation")
    spreads = [part["std"] or 0 for part in parts]
    means = [part["mean"] for part in parts]
    panel.errorbar(shares, means, spreads, color="0.4", marker="none", capsize=4, label="upcycled")
    colors = islice(cycle(_COLORS), 1, None)
    for color, share, mean, part in zip(colors, shares, means, summary["lengths"][1:]):
        panel.plot([share], [mean], "D", color=color)
        values = [run["loss"][CAUSAL][name] for run in groups[part["first_step"]]]
        panel.plot([share] * len(values), values, "o", color=color, markersize=4, markerfacecolor="none")
    panel.set_xticks(shares, [f"{share:.3g}" for share in shares])
    panel.set_xlim(left=0, right=1.15 * max(shares))
