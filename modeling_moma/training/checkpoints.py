# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a `Trainer` are whole."""

import json
import logging
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a run.

    `Trainer` writes straight into a checkpoint's folder, its state last of all: where no state can be read, a run was
    killed while it wrote. Such a folder is warned of, and written anew by a run that comes by its step again.

    Args:
        folder: the run's output folder, which may be missing.

    Returns:
        The checkpoint's folder, or `None` where none is whole.
    """
    steps = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if path.is_dir() and step.isdecimal():
            steps[int(step)] = path
    for step in sorted(steps, reverse=True):
        if _is_whole(steps[step]):
            return str(steps[step])
        logger.warning(f"{steps[step]} is not whole: its run was killed while it wrote it. It is passed over.")
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True
