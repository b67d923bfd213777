# SPDX-License-Identifier: Apache-2.0
"""How long a training step of each recipe takes, measured in turns on a machine that does nothing else."""

import multiprocessing
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from modeling_moma.evaluation.measures import load_model
from modeling_moma.utils.hardware import keep_freed_memory

from .grid import Run
from .training import CONSTANT, RECIPE_FILE, Study, recipe_text, trainer_of


# in one measurement; and rounds, of which there is a measurement of each recipe
STEPS, ROUNDS = 8, 9


class _Steps:
    """Training steps of a run that has been trained, on one stream of data for all runs."""

    def __init__(self, study: Study, run: Run, checkpoint: Path):
        keep_freed_memory()
        self._folder = tempfile.TemporaryDirectory()
        output = Path(self._folder.name)
        (output / RECIPE_FILE).write_text(recipe_text(study, run, CONSTANT))
        self._trainer = trainer_of(study, run, output, study.pace.steps(study.pace.longest))
        self._trainer.model.load_state_dict(load_model(str(checkpoint), "cpu").state_dict())
        # `train()` would set it
        self._trainer.current_gradient_accumulation_steps = 1
        self._optimizer = self._trainer.create_optimizer()
        self._model = self._trainer.accelerator.prepare_model(self._trainer.model).train()
        self._batches = iter(self._trainer.get_train_dataloader())

    def take(self, steps: int) -> float:
        """Take steps and return their seconds; batches are read before."""
        batches = list(islice(self._batches, steps))
        began = time.perf_counter()
        for batch in batches:
            self._trainer.training_step(self._model, batch)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return time.perf_counter() - began


_steps: _Steps | None = None


def _begin(study: Study, run: Run, checkpoint: Path) -> None:
    global _steps
    _steps = _Steps(study, run, checkpoint)


def _take(steps: int) -> float:
    if _steps is None:
        raise RuntimeError("the process has no run.")
    return _steps.take(steps)


def step_seconds(
    study: Study, checkpoints: Mapping[Run, Path], rounds: int = ROUNDS, steps: int = STEPS
) -> dict[str, list[float]]:
    """Return the seconds of a training step: forward, backward and optimizer.

    Each run has a process of its own, in which it stays as it is in training; one of them works at a time.

    Args:
        study ([`Study`]):
            see there.
        checkpoints (`Mapping[Run, Path]`):
            of a finished branch of each run.
        rounds (`int`, *optional*, defaults to `ROUNDS`):
            in each of which every run is measured once. One more goes before them and is not counted.
        steps (`int`, *optional*, defaults to `STEPS`):
            in a measurement.

    Returns:
        `dict[str, list[float]]`: seconds a step in each round, by recipe.
    """
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[float]] = {run.recipe: [] for run in checkpoints}
    with ExitStack() as stack:
        pools = {
            run.recipe: stack.enter_context(
                ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(study, run, checkpoint))
            )
            for run, checkpoint in checkpoints.items()
        }
        for pool in pools.values():
            pool.submit(_take, steps).result()
        for _ in range(rounds):
            for recipe, pool in pools.items():
                found[recipe].append(pool.submit(_take, steps).result() / steps)
    return found
