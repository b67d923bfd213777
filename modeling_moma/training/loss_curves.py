# SPDX-License-Identifier: Apache-2.0
"""Loss curves of Trainer runs over training FLOPs, and the saving that one shows against the other."""

import copy
import json
from pathlib import Path
from statistics import fmean

from transformers.trainer import TRAINER_STATE_NAME

from ..configuration_moma import MomaConfig
from ..data.documents import Documents
from ..data.stream import DocumentExamples
from ..errors_moma import InputError
from ..planning.costs import eta_by_modality, training_flops
from ..utils.errors import needs_extra
from .checkpoints import last_checkpoint
from .stages import RUN_FILE


CURVES = {"overall": "eval_loss", "text": "eval_text_loss", "image": "eval_image_loss"}


def tokens_of_example(documents: Documents, processor, num_examples: int = 4096) -> dict[str, float]:
    """Return the mean numbers of text and image tokens of a training example."""
    stream = DocumentExamples([documents], [1.0], num_examples)
    lengths = [len(stream[index]["input_ids"]) for index in range(num_examples)]
    image = processor.image_seq_length
    return {"text": sum(lengths) / num_examples - image, "image": float(image)}


def read_run(folder: str | Path, tokens: dict[str, float]) -> dict:
    """Read what `Trainer` has written about a run, finished or not."""
    folder = Path(folder)
    run_file = folder / RUN_FILE
    if not run_file.is_file():
        raise InputError(f"`folder` {str(folder)!r} has no {RUN_FILE}, which `moma pretrain` writes at its start.")
    # the trainer's state knows neither gradient accumulation nor processes
    described = json.loads(run_file.read_text())
    batch_size, first_step = described["examples_a_step"], described.get("first_step", 0)
    if not (folder / TRAINER_STATE_NAME).is_file():
        last = last_checkpoint(folder)
        if last is None:
            raise InputError(f"`folder` {str(folder)!r} has neither {TRAINER_STATE_NAME} nor a checkpoint of Trainer.")
        folder = Path(last)
    state = json.loads((folder / TRAINER_STATE_NAME).read_text())
    config = MomaConfig.from_pretrained(folder)
    history = state["log_history"]
    summary = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    steps = state["global_step"]
    trained = _with_logged_load(config, history)
    seed_flops, flops_a_step = (
        batch_size * training_flops(model, tokens, round(sum(tokens.values())))
        for model in (_seed_config(trained), trained)
    )

    def flops_at(step: int) -> float:
        return min(step, first_step) * seed_flops + max(step - first_step, 0) * flops_a_step

    points = {
        # a resumed run evaluates its checkpoint once more; the later one counts
        entry["step"]: {"step": entry["step"], "flops": flops_at(entry["step"])}
        | {name: entry[key] for name, key in CURVES.items()}
        for entry in history
        # the first evaluation costs no FLOPs, which no ratio can be made of
        if entry["step"] > 0 and all(key in entry for key in CURVES.values())
    }
    curve = list(points.values())
    if not curve:
        raise InputError(f"`folder` {str(folder)!r} holds no evaluation with {', '.join(CURVES.values())}.")
    return {
        "steps": steps,
        "first_step": first_step,
        "batch_size": batch_size,
        "examples": steps * batch_size,
        "seconds": summary.get("train_runtime"),
        "timed_steps": _timed_steps(summary, batch_size),
        "flops": flops_at(steps),
        "curve": curve,
    }


def _timed_steps(summary: dict, batch_size: int) -> int | None:
    # the trainer's rate counts the examples since its last start only
    if "train_samples_per_second" not in summary:
        return None
    return round(summary["train_samples_per_second"] * summary["train_runtime"] / batch_size)


def _seed_config(config: MomaConfig) -> MomaConfig:
    seed = copy.deepcopy(config)
    seed.num_experts = dict.fromkeys(config.num_experts, 1) if isinstance(config.num_experts, dict) else 1
    return seed


def _with_logged_load(config: MomaConfig, history: list[dict]) -> MomaConfig:
    loads = {
        modality: [entry[key] for entry in history if key in entry]
        for modality, key in ((name, f"{name}_depth_load") for name in config.modalities)
    }
    if not config.depth_layers or not all(loads.values()):
        return config
    trained = copy.deepcopy(config)
    trained.depth_capacity = {modality: fmean(values) for modality, values in loads.items()}
    return trained


def savings(dense: dict, sparse: dict) -> dict[str, dict]:
    """Return eta (MoMa footnote 6) of two runs of `read_run`, `{"text": {"value": ..., "bound": ...}, ...}`."""
    points = [
        {name: [(point["flops"], point[name]) for point in run["curve"]] for name in CURVES} for run in (dense, sparse)
    ]
    return {name: {"value": eta.value, "bound": eta.bound} for name, eta in eta_by_modality(*points).items()}


def plot_curves(runs: dict[str, dict], path: str | Path) -> None:
    """Draw the loss curves of runs over training FLOPs, a panel for text and one for images."""
    with needs_extra("the figure needs Matplotlib", "train"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, name, title in zip(panels, ("text", "image"), ("text tokens", "image tokens"), strict=True):
        for label, run in runs.items():
            flops, losses = zip(*[(point["flops"], point[name]) for point in run["curve"]], strict=True)
            panel.plot(flops, losses, marker=".", label=label)
        panel.set(title=title, xlabel="training FLOPs", ylabel="causal validation loss (nats per token)")
        panel.grid(alpha=0.3)
        panel.legend()
    # no version of Matplotlib in the file, so that equal curves give equal files
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
