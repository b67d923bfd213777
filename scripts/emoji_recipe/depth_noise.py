# SPDX-License-Identifier: Apache-2.0
"""How much a model with mixture of depths loses by wrong depth decisions (MoMa section 4.6)."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from emoji_recipe.depth_selection import flipped_depth, watched_depth
from modeling_moma.training.measures import held_out_loss
from modeling_moma.training.tables import markdown_table, spread, with_spread


SIGMAS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
PAPER_BREAK_EVEN = 0.005
LOSSES = {"text": "text tokens", "image": "picture tokens", "overall": "all tokens"}

TOP_K = "depth: batch top-k with flips (sees the future, not a measure of quality)"
THRESHOLD = "depth: threshold (causal)"
WITHOUT_DEPTH = "without depth (causal)"


def noise_sweep(
    model, processor, examples: list[dict], batch_size: int, sigmas: Sequence[float] = SIGMAS, seed: int = 0
) -> dict:
    """
    Held-out losses of a model whose depth layers choose by top-k of the batch, with some decisions flipped, and by
    threshold. Experts choose by threshold throughout.

    Args:
        model: in eval mode, with depth layers.
        processor: its tokenizer pads.
        examples: `input_ids` each.
        batch_size: examples at once, which compete with one another under top-k.
        sigmas: shares of flipped decisions.
        seed: of the flips.

    Returns:
        `noise`, for each sigma the `loss` and the share that was `flipped` indeed; `threshold`, its `loss`,
        `error_rate` against top-k and that of each of the `layers`, with their load.
    """

    def measure(depth_routing, name):
        with watched_depth(model) as tallies:
            loss = held_out_loss(
                model, processor, examples, batch_size, "threshold", f"loss: {name}", depth_routing=depth_routing
            )
        return loss, tallies

    noise = []
    for sigma in sigmas:
        with flipped_depth(model, sigma, seed):
            loss, tallies = measure("expert_choice", f"{100 * sigma:g} % flipped")
        noise.append({"sigma": sigma, "loss": loss, "flipped": _mean_error_rate(tallies)})
    loss, tallies = measure("threshold", "threshold")
    modalities = model.config.modalities
    layers = [{"layer": layer, **tally.describe(modalities)} for layer, tally in tallies.items()]
    return {
        "noise": noise,
        "threshold": {"loss": loss, "error_rate": _mean_error_rate(tallies), "layers": layers},
    }


def _mean_error_rate(tallies):
    return fmean(tally.error_rate for tally in tallies.values())


def break_even(sigmas: Sequence[float], losses: Sequence[float], line: float) -> float | None:
    """
    Share of flipped decisions at which a loss rises above a line, linear between the points.

    Args:
        sigmas: ascending.
        losses: one for each.
        line: the loss of the model without depth.

    Returns:
        `float`, or `None` when the loss never crosses the line: it is above from the start, or below to the end.
    """
    points = list(zip(sigmas, losses, strict=True))
    for (sigma, loss), (next_sigma, next_loss) in zip(points, points[1:]):
        if loss <= line < next_loss:
            return sigma + (line - loss) / (next_loss - loss) * (next_sigma - sigma)
    return None


def summarize(sweeps: Sequence[dict], baselines: Sequence[dict]) -> dict:
    """
    Means and spreads over models, and break-even points.

    Args:
        sweeps: results of [`noise_sweep`] over the same sigmas.
        baselines: losses of models without depth.

    Returns:
        `dict`: for each of `LOSSES` the `noise` (a `spread` for each of the `sigmas`), `threshold` and
        `without_depth`, and `break_even`: of the mean curve against the mean baseline (`mean`) and of each model's
        curve against it (`models`); `error_rate` of threshold in the mean over layers, and `error_rate_by_layer`.
    """
    sigmas = [point["sigma"] for point in sweeps[0]["noise"]]
    summary = {"sigmas": sigmas}
    for name in LOSSES:
        curves = [[point["loss"][name] for point in sweep["noise"]] for sweep in sweeps]
        noise = [spread(losses) for losses in zip(*curves, strict=True)]
        without = spread([loss[name] for loss in baselines])
        summary[name] = {
            "noise": noise,
            "threshold": spread([sweep["threshold"]["loss"][name] for sweep in sweeps]),
            "without_depth": without,
            "break_even": {
                "mean": break_even(sigmas, [part["mean"] for part in noise], without["mean"]),
                "models": [break_even(sigmas, losses, without["mean"]) for losses in curves],
            },
        }
    summary["error_rate"] = spread([sweep["threshold"]["error_rate"] for sweep in sweeps])
    layers = zip(*[sweep["threshold"]["layers"] for sweep in sweeps], strict=True)
    summary["error_rate_by_layer"] = [
        {"layer": parts[0]["layer"], **spread([part["error_rate"] for part in parts])} for parts in layers
    ]
    return summary


def break_even_text(part: dict, sigmas: Sequence[float]) -> str:
    """The break-even of one loss of [`summarize`] in words."""
    sigma = part["break_even"]["mean"]
    if sigma is not None:
        return f"{100 * sigma:.2f} %"
    if part["noise"][0]["mean"] > part["without_depth"]["mean"]:
        return "None (worse than without depth already at the least noise)"
    return f"None (better than without depth up to {100 * sigmas[-1]:g} %)"


def noise_report(summary: dict) -> str:
    """The summary as Markdown."""
    sigmas = summary["sigmas"]
    rows = [
        [f"{TOP_K}: {100 * sigma:g} %", *(with_spread(summary[name]["noise"][index]) for name in LOSSES)]
        for index, sigma in enumerate(sigmas)
    ]
    rows.append([THRESHOLD, *(with_spread(summary[name]["threshold"]) for name in LOSSES)])
    rows.append([WITHOUT_DEPTH, *(with_spread(summary[name]["without_depth"]) for name in LOSSES)])
    rows.append(["break-even", *(break_even_text(summary[name], sigmas) for name in LOSSES)])
    errors = [
        [str(part["layer"]), with_spread(part, 2, 100, " %")]
        for part in (*summary["error_rate_by_layer"], {"layer": "mean", **summary["error_rate"]})
    ]
    return "\n\n".join(
        [
            markdown_table(["held-out loss, nats per target token", *LOSSES.values()], rows),
            f"Break-even over all tokens: {break_even_text(summary['overall'], sigmas)}; the paper's: "
            f"{100 * PAPER_BREAK_EVEN:g} % (635M model, section 4.6).",
            markdown_table(["layer", "decisions of threshold that differ from batch top-k"], errors),
        ]
    )


def plot_noise(summary: dict, path: str | Path) -> None:
    """
    Draws the losses over the share of flipped decisions, a panel for each of `LOSSES`.

    Args:
        summary: from [`summarize`].
        path: the PNG.
    """
    # the extra `train` brings it
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    percent = [100 * sigma for sigma in summary["sigmas"]]
    figure, panels = pyplot.subplots(1, len(LOSSES), figsize=(13, 4.6), layout="constrained")
    for panel, (name, title) in zip(panels, LOSSES.items(), strict=True):
        part = summary[name]
        means = [point["mean"] for point in part["noise"]]
        spreads = [point["std"] or 0 for point in part["noise"]]
        panel.errorbar(percent, means, spreads, marker=".", capsize=3, color="tab:blue", label=TOP_K)
        panel.axhline(part["without_depth"]["mean"], color="tab:red", linestyle="--", label=WITHOUT_DEPTH)
        threshold = part["threshold"]["mean"]
        panel.axhline(threshold, color="tab:green", linestyle=":")
        label = f"{THRESHOLD}, at its error rate"
        panel.plot([100 * summary["error_rate"]["mean"]], [threshold], "D", color="tab:green", label=label)
        panel.axvline(100 * PAPER_BREAK_EVEN, color="0.6", linewidth=1, label="the paper's break-even, 0.5 %")
        panel.set_xscale("symlog", linthresh=0.1, linscale=0.5)
        panel.set_xticks(percent, [f"{share:g}" for share in percent])
        panel.set_xlim(left=-0.03)
        panel.minorticks_off()
        panel.set(title=title, xlabel="flipped depth decisions (%)", ylabel="held-out loss (nats per token)")
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    # without the version in it, equal losses give equal files
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
    pyplot.close(figure)
