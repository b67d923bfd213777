# SPDX-License-Identifier: Apache-2.0
"""Trains a run of the study: a trunk at one learning rate, and for each budget a decay that goes on from it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from modeling_moma.cli import upcycle
from modeling_moma.cli.pretrain import parse_arguments
from modeling_moma.training.checkpoints import (
    checkpoint_step,
    last_checkpoint,
    read_state,
    without_incomplete_checkpoints,
)
from modeling_moma.training.pretraining import build_trainer, read_parts
from modeling_moma.training.stage_trainer import StageTrainer
from modeling_moma.utils.atomic_files import atomic_write

from .grid import Pace, Run, model_fields, seed_of


RECIPE_FILE = "recipe.yaml"
# of a run that is upcycled: folders of the seed's training, and of the model that it grew into
SEED, GROWN = "seed", "grown"
CONSTANT = {"lr_scheduler_type": "constant_with_warmup"}
# the processor of runs whose data are "shipped", or a twelfth of these
SHIPPED = Path(__file__).resolve().parents[2] / "model_cards" / "moma-icons"
# held-out documents of each source in a point of a curve
CURVE_DOCUMENTS = 200


@dataclass(frozen=True)
class Study:
    """Where the study reads and writes.

    Args:
        recipe (`Path`):
            `recipes/study.yaml`.
        processor (`Path`):
            folder of the study's own processor.
        tokens (`Path`):
            folder whose subfolders hold the tokens of each selection of the data, as `all`.
        runs (`Path`):
            folder of the runs, one folder each.
        pace ([`Pace`], *optional*):
            see there.
    """

    recipe: Path
    processor: Path
    tokens: Path
    runs: Path
    pace: Pace = Pace()

    def processor_of(self, data: str) -> Path:
        """Return the folder of the processor that a selection of the data is read through, see [`Run`]."""
        return SHIPPED if data.startswith("shipped") else self.processor


def finished(folder: Path, step: int) -> Path | None:
    """Return the checkpoint of a step in a folder, `None` before there is one."""
    checkpoint = last_checkpoint(str(folder)) if folder.is_dir() else None
    is_there = checkpoint is not None and checkpoint_step(checkpoint) >= step
    return Path(checkpoint) if is_there else None  # pyright: ignore[reportArgumentType]


def train_branch(study: Study, run: Run, millions: int) -> Path:
    """Train a run to the end of a budget, as far as that is not done, and return the last checkpoint.

    Args:
        study (`Study`):
            see [`Study`].
        run (`Run`):
            see [`Run`].
        millions (`int`):
            the budget, in millions of tokens. A smaller one is to be trained before it, since the trunk keeps its last
            checkpoint alone.
    """
    trunk, branch = study.runs / run.name / "trunk", study.runs / run.name / f"{millions}M"
    steps, leaves = study.pace.steps(millions), study.pace.branch_step(millions)
    if done := finished(branch, steps):
        return done
    start = last_checkpoint(str(branch)) if branch.is_dir() else None
    if start is None:
        train(study, run, trunk, leaves, CONSTANT, last_checkpoint(str(trunk)))
        start = _checkpoint_at(trunk, leaves)
    seed = seed_of(run.recipe)
    # an upcycled model has a schedule of its own
    first_step = 0 if seed is None else study.pace.steps(seed.millions)
    decay = {
        "num_stable_steps": leaves - first_step - study.pace.warmup_steps,
        "num_decay_steps": steps - leaves,
        "decay_type": "linear",
    }
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}
    train(study, run, branch, steps, schedule, start)
    return _checkpoint_at(branch, steps)


def _checkpoint_at(folder: Path, step: int) -> Path:
    checkpoint = finished(folder, step)
    if checkpoint is None or checkpoint_step(checkpoint) != step:
        raise RuntimeError(f"{folder}: there is no checkpoint of step {step}: was a larger budget trained before?")
    return checkpoint


def train(
    study: Study, run: Run, output: Path, stop_at: int, schedule: dict[str, Any], checkpoint: str | Path | None
) -> None:
    """Take steps until `stop_at` and save there.

    Args:
        study (`Study`):
            see [`Study`].
        run (`Run`):
            see [`Run`].
        output (`Path`):
            folder of the checkpoints.
        stop_at (`int`):
            the last step.
        schedule (`dict[str, Any]`):
            of the learning rate, fields of `TrainingArguments`.
        checkpoint (`str | Path`, *optional*):
            goes on from there.
    """
    if checkpoint is not None and checkpoint_step(str(checkpoint)) >= stop_at:
        return
    output.mkdir(parents=True, exist_ok=True)
    atomic_write(output / RECIPE_FILE, lambda path: path.write_text(recipe_text(study, run, schedule)))
    trainer = trainer_of(study, run, output, stop_at, upcycled(study, run))
    # the earlier stage tells the place in the data
    start = trainer.earlier_stage if checkpoint is None else str(checkpoint)
    with without_incomplete_checkpoints(trainer):
        trainer.train(resume_from_checkpoint=start)


def upcycled(study: Study, run: Run) -> Path | None:
    """Return the model that a run begins with, once its seed is trained and has grown; `None` for random weights."""
    seed = seed_of(run.recipe)
    if seed is None:
        return None
    folder, grown = study.runs / run.name / SEED, study.runs / run.name / GROWN
    if not grown.is_dir():
        steps = study.pace.steps(seed.millions)
        train(study, replace(run, recipe=seed.recipe), folder, steps, CONSTANT, last_checkpoint(str(folder)))
        # the paper's noise on fresh routers, fading over as many steps as the seed took
        noise = ["--gumbel-noise-steps", str(steps), "--seed", str(run.seed)]
        checkpoint = str(_checkpoint_at(folder, steps))
        upcycle.main(["--model", checkpoint, "--to", seed.experts, "--output", str(grown), *noise])
    return grown


def recipe_text(study: Study, run: Run, schedule: dict[str, Any]) -> str:
    """Return the recipe of a run, as YAML."""
    content = yaml.safe_load(study.recipe.read_text())
    content["model"] |= model_fields(run)
    content["trainer"] |= {
        "learning_rate": run.learning_rate,
        "warmup_steps": study.pace.warmup_steps,
        "eval_on_start": False,
        "disable_tqdm": True,
        **schedule,
    }
    return yaml.safe_dump(content, sort_keys=False)


def trainer_of(study: Study, run: Run, output: Path, stop_at: int, model: Path | None = None) -> StageTrainer:
    """Return the trainer of a run; its stream of data is that of the longest budget, whatever it is stopped at."""
    pace = study.pace
    begins = [] if model is None else ["--model", str(model)]
    args = parse_arguments(
        [
            str(output / RECIPE_FILE),
            *("--processor", str(study.processor_of(run.data)), "--tokens", str(study.tokens / run.data)),
            *("--output", str(output), "--seed", str(run.seed), "--batch-size", str(pace.rows)),
            *("--steps", str(pace.steps(pace.longest)), "--stop-at", str(stop_at)),
            *("--save-steps", str(pace.curve_steps), "--save-total-limit", "1"),
            *("--eval-steps", str(pace.curve_steps), "--logging-steps", str(pace.curve_steps)),
            *("--eval-examples", str(CURVE_DOCUMENTS)),
            *begins,
        ]
    )
    return build_trainer(args, read_parts(args))


def log_of(checkpoint: Path) -> list[dict[str, Any]]:
    """Return what was logged up to a checkpoint, in the trunk as in the branch."""
    state = read_state(checkpoint)
    return [] if state is None else state["log_history"]


def forget(study: Study, run: Run, millions: int) -> None:
    """Delete what a finished branch needs only to go on."""
    checkpoint = finished(study.runs / run.name / f"{millions}M", study.pace.steps(millions))
    if checkpoint is not None:
        for name in ("optimizer.pt", "scheduler.pt"):
            (checkpoint / name).unlink(missing_ok=True)
