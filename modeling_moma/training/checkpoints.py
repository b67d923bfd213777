# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a `Trainer` are complete, and removal of those that a full disk has cut short."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils.errors import is_disk_full


logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint of a run.

    `Trainer` writes straight into a checkpoint's folder, its state last of all: where no state can be read, a run was
    killed while it wrote. Such a folder is warned of, and written anew by a run that comes by its step again.

    Args:
        folder (`str | Path`):
            the run's output folder, which may be missing.

    Returns:
        `str | None`: the checkpoint's folder, or `None` where none is complete.
    """
    for path in numbered_checkpoints(folder):
        if read_state(path) is not None:
            return str(path)
        logger.warning(f"{path} is not whole: its run was killed while it wrote it. It is passed over.")
    return None


def whole_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a folder whose state can be read, the newest first."""
    return [path for path in numbered_checkpoints(folder) if read_state(path) is not None]


def torn_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a folder that were never written to their end."""
    return [path for path in numbered_checkpoints(folder) if read_state(path) is None]


@contextmanager
def without_torn_checkpoints(output: str | Path) -> Iterator[None]:
    """Remove the checkpoint that was being written where the disk is full: it takes space and is of no use."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            for path in torn_checkpoints(output):
                shutil.rmtree(path, ignore_errors=True)
        raise


def checkpoint_step(checkpoint: str | Path) -> int:
    """Return the step that a checkpoint was written at, by its name."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return the trainer's state in a checkpoint or an output folder, `None` where there is none that can be read."""
    try:
        return json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return None


def numbered_checkpoints(folder: str | Path) -> list[Path]:
    """Return the folders of a run that are named as checkpoints with a step, the newest first."""
    steps = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if path.is_dir() and step.isdecimal():
            steps[int(step)] = path
    return [steps[step] for step in sorted(steps, reverse=True)]
