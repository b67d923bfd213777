# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a `Trainer` are complete, and removal of those that a full disk has cut short."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils.constants import FSDP_MODEL_NAME
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors_moma import InputError
from ..utils.errors import is_disk_full


# where Trainer writes weights under FSDP: a folder of shards, or a file beside those of `from_pretrained`
SHARDS, WHOLE = f"{FSDP_MODEL_NAME}_0", f"{FSDP_MODEL_NAME}.bin"
# what DeepSpeed writes beside
DEEPSPEED = "latest"

logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | Path) -> str | None:
    """Return the newest complete checkpoint of a run.

    `Trainer` writes straight into a checkpoint's folder, its state last of all: where no state can be read, a run was
    killed while it wrote. Such a folder is warned of.
    """
    for path in numbered_checkpoints(folder):
        if read_state(path) is not None:
            return str(path)
        logger.warning(f"{path} is not whole: its run was killed while it wrote it. It is passed over.")
    return None


def whole_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a folder whose state can be read, the newest first."""
    return [path for path in numbered_checkpoints(folder) if read_state(path) is not None]


def incomplete_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a folder that were never written to their end."""
    return [path for path in numbered_checkpoints(folder) if read_state(path) is None]


def remove_incomplete_checkpoints(output: str | Path) -> None:
    """Remove what is of no use: `Trainer` keeps the highest steps, and would delete whole checkpoints for these."""
    for path in incomplete_checkpoints(output):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def without_incomplete_checkpoints(trainer: Trainer) -> Iterator[None]:
    """Train without checkpoints that were never written to their end: of killed runs, and on a full disk its own."""
    output = str(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        remove_incomplete_checkpoints(output)
    trainer.accelerator.wait_for_everyone()
    try:
        with _one_failure():
            yield
    except Exception as error:
        # the first process may be at work in it, which removes it when it fails or starts again
        if is_disk_full(error) and trainer.is_world_process_zero():
            remove_incomplete_checkpoints(output)
        raise


@contextmanager
def _one_failure() -> Iterator[None]:
    """Raise the error of one process in the place of torch's list of those of all, which is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        raise failure from error


def checkpoint_step(checkpoint: str | Path) -> int:
    """Return the step that a checkpoint was written at, by its name."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def check_kind(checkpoint: str | Path, kind: str | None) -> None:
    """Raise where a checkpoint was written under another kind of parallelism than the run that goes on from it."""
    written = next((name for name in (SHARDS, WHOLE, DEEPSPEED) if (Path(checkpoint) / name).exists()), None)
    if written != kind:
        by = {
            None: "a run without FSDP and DeepSpeed, as by torchrun or configs/accelerate/ddp.yaml",
            DEEPSPEED: "DeepSpeed",
            SHARDS: "FSDP with `fsdp_state_dict_type: SHARDED_STATE_DICT`",
            WHOLE: "FSDP with `fsdp_state_dict_type: FULL_STATE_DICT`",
        }
        raise InputError(
            f"`--resume`: {str(checkpoint)!r} was written by {by[written]}, and this is {by[kind]}: start it as "
            "before, with any number of processes (docs/how-to/scaling.md)."
        )
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if kind is None else ():
        if not (Path(checkpoint) / name).is_file():
            raise InputError(
                f"`--resume`: {str(checkpoint)!r} has no {name}, without which it would begin anew in a part: was it "
                "copied as a whole?"
            )


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
