# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run that are complete, and trainings in stages that go on from those of another."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from tokenization import MomaProcessor

from ..errors_moma import InputError
from ..utils.atomic_files import atomic_write, write_folder_aside
from ..utils.errors import is_disk_full
from ..utils.messages import one_line
from ..utils.records import read_record


# where Trainer writes weights under FSDP: a folder of shards, or a file beside those of `from_pretrained`
SHARDS, WHOLE = f"{FSDP_MODEL_NAME}_0", f"{FSDP_MODEL_NAME}.bin"
# what DeepSpeed writes beside
DEEPSPEED = "latest"
RUN_FILE = "run.json"
# receipts of what was made of an earlier stage's model
UPCYCLING_FILE, LAYERS_FILE = "upcycling.json", "layers.json"
# what a run's fingerprint says of its data beside what they are made of
EARLIER_STEPS = "earlier_steps"

logger = logging.get_logger(__name__)


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


def data_order(folder: str | Path) -> dict[str, Any] | None:
    """Return what decided on the order of the data in the training that a model comes from."""
    folder = Path(folder).resolve()
    run_folder = folder.parent if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else folder
    if (run_folder / RUN_FILE).is_file():
        run = read_record(run_folder / RUN_FILE)
        facts = run.get("fingerprint", {})
        order = {"seed": facts.get("seed", {}).get("seed"), "examples_a_step": run.get("examples_a_step")}
        if data := facts.get("data"):
            order["data"] = {name: value for name, value in data.items() if name != EARLIER_STEPS}
        return None if None in (order["seed"], order["examples_a_step"]) else order
    for name in (UPCYCLING_FILE, LAYERS_FILE):
        if (folder / name).is_file():
            return read_record(folder / name).get("data_order")
    return None


def save_next_stage(
    model: PreTrainedModel, source: str | Path, output: str | Path, receipt_file: str, receipt: dict[str, Any]
) -> None:
    """Save a model that was made of an earlier stage's, with that stage's place in the data, for `moma pretrain`."""

    def write(folder: Path):
        model.save_pretrained(folder)
        contents = {"data_order": data_order(source), **receipt}
        (folder / receipt_file).write_text(json.dumps(contents, indent=2) + "\n")
        state = Path(source) / TRAINER_STATE_NAME
        if state.is_file():
            shutil.copy(state, folder / TRAINER_STATE_NAME)

    write_folder_aside(output, write)


def feeding_fields(device: str) -> dict[str, Any]:
    """Return the settings of the Trainer by which a step waits for its device no more often than it has to.

    Batches go to a GPU from pinned memory, beside its work, and no step reads its loss: a loss that is no number ends
    the training at its next log, evaluation or checkpoint, see [`ResumedTrainer`].
    """
    on_gpu = device == "cuda"
    return {
        "dataloader_pin_memory": on_gpu,
        "accelerator_config": {"non_blocking": on_gpu},
        "logging_nan_inf_filter": False,
    }


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Set a model's implementation of attention."""
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise InputError(f"--attn-implementation {implementation!r}: {one_line(error, 300)}") from error


def examples_a_step(args: TrainingArguments) -> int:
    """Return the examples that one optimizer step takes on all devices together."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def first_step(
    model: str | None, args: TrainingArguments, stop_at: int | None = None, restart_data: bool = False
) -> int:
    """Return the training steps that the earlier stage of `--model` took, 0 when nothing tells."""
    state_file = Path(model or "") / TRAINER_STATE_NAME
    if not model or restart_data or not state_file.is_file():
        return 0
    state, anew = _earlier_state(state_file), "--restart-data begins anew in the data."
    if state.global_step == state.max_steps:
        raise InputError(
            f"`--model` {model!r} comes from a training that is finished: it has taken all of its "
            f"{state.max_steps} steps, and has none left to go on with. {anew}"
        )
    # the seed decides on the order of the data, and examples a step on the place in it
    checks: list[tuple[str, int | None, int]] = []
    order = data_order(model)
    if order is None:
        logger.warning(
            f"`--model` {model!r} does not come with the {RUN_FILE} of its training, so the order of the data "
            f"cannot be checked: with another `seed` or `gradient_accumulation_steps`, or another number of devices, "
            f"some would come again. {anew}"
        )
        checks.append(("`per_device_train_batch_size` times devices", state.train_batch_size, args.train_batch_size))
    else:
        product = "`per_device_train_batch_size` times `gradient_accumulation_steps` times devices"
        checks.append(("`seed`", order["seed"], args.seed))
        checks.append((product, order["examples_a_step"], examples_a_step(args)))
    for name, then, now in checks:
        if then != now:
            raise InputError(
                f"{name} = {now} is not the {then} of the stage that `--model` comes from, so it would meet some of "
                f"its data again. {anew}"
            )
    if state.global_step >= (stop_at or args.max_steps):
        raise InputError(
            f"`--model` has taken {state.global_step} steps already, which `max_steps` {args.max_steps} and "
            f"`--stop-at` {stop_at} count, too: nothing is left to train. {anew}"
        )
    return state.global_step


def _earlier_state(path: Path) -> TrainerState:
    try:
        return TrainerState(**read_record(path))
    except TypeError as error:
        raise InputError(
            f"{str(path)!r} is none that a training of this version wrote ({one_line(error)}). --restart-data begins "
            "anew in the data."
        ) from error


def copy_checkpoint(
    checkpoint: str | Path, weights: str | Path, output: Path, processor: MomaProcessor, model: PreTrainedModel
):
    """Make the weights of a run's checkpoint, the state of its last one, and the processor, its result."""
    states = ("optimizer.*", "scheduler.pt", "rng_state*", WHOLE, TRAINER_STATE_NAME)

    def write(folder: Path):
        if (Path(weights) / SHARDS).is_dir():
            dcp.load({"model": model.state_dict()}, checkpoint_id=Path(weights) / SHARDS, no_dist=True)
            model.save_pretrained(folder)
        else:
            shutil.copytree(weights, folder, ignore=shutil.ignore_patterns(*states))
        processor.save_pretrained(folder)

    write_folder_aside(output, write)
    # last: the sign of a finished run
    atomic_write(output / TRAINER_STATE_NAME, lambda path: shutil.copy(Path(checkpoint) / TRAINER_STATE_NAME, path))
