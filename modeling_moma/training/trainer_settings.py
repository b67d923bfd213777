# SPDX-License-Identifier: Apache-2.0
"""The Trainer's settings of a recipe, tried before the first step."""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.utils import logging

from ..errors_moma import InputError
from ..utils.fields import Count, Float, Int, NotNegative, Seed, read_fields
from ..utils.hardware import check_precision, precision_fields
from ..utils.messages import one_line
from .checkpoints import feeding_fields
from .muon import MUON


logger = logging.get_logger(__name__)

# the schedule of the learning rate where a recipe names none
SCHEDULE = "cosine_with_min_lr"


AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)
# below 1 a share of all steps
Steps = Annotated[Int | Float, Field(gt=0)]
WarmupSteps = Annotated[Int | Float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class TrainerFields:
    """Fields of a recipe's section `trainer` that have defaults or ranges of their own.

    Args:
        max_steps (`int`, *optional*, defaults to `4000`):
            steps of the optimizer in all stages.
        per_device_train_batch_size (`int`, *optional*, defaults to `32`):
            sequences of a device at once.
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            batches of a step.
        learning_rate (`float`, *optional*, defaults to `0.0015`):
            largest one of the schedule.
        warmup_steps (`int | float`, *optional*, defaults to `150`):
            steps in which the learning rate rises.
        weight_decay (`float`, *optional*, defaults to `0.1`):
            of the optimizer.
        eval_steps (`int | float`, *optional*, defaults to `400`):
            steps between two evaluations.
        save_steps (`int | float`, *optional*, defaults to `400`):
            steps between two checkpoints.
        save_total_limit (`int | None`, *optional*, defaults to `2`):
            checkpoints to keep.
        logging_steps (`int | float`, *optional*, defaults to `50`):
            steps between two lines of the log.
        seed (`int`, *optional*, defaults to `0`):
            of weights, order and choices.
    """

    max_steps: Count = 4000
    per_device_train_batch_size: Count = 32
    gradient_accumulation_steps: Count = 1
    learning_rate: NotNegative = 1.5e-3
    warmup_steps: WarmupSteps = 150
    weight_decay: NotNegative = 0.1
    eval_steps: Steps = 400
    save_steps: Steps = 400
    save_total_limit: Int | None = 2
    logging_steps: Steps = 50
    seed: Seed = 0


def with_defaults(kind: type[TrainerFields], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's section `trainer` over the defaults, with the fields that have ranges checked."""
    own = {entry.name for entry in dataclasses.fields(kind)}
    given = {name: value for name, value in trainer.items() if name in own and value is not None}
    checked = vars(read_fields(kind, given, "the recipe's section `trainer`"))
    return {**checked, **trainer, **{name: checked[name] for name in given}}


class OneGpuArguments(TrainingArguments):
    """`TrainingArguments` of a process that trains on one GPU of those that it sees, and says so."""

    def __post_init__(self):
        """Check the settings."""
        super().__post_init__()
        if (number := super().n_gpu) > 1:
            logger.warning(
                f"{number} GPUs are visible, and this process trains on the first: `torchrun --nproc-per-node "
                f"{number} -m modeling_moma` in place of `moma` trains on all. CUDA_VISIBLE_DEVICES chooses another."
            )

    @property
    def n_gpu(self) -> int:
        """GPUs of the process."""
        return min(super().n_gpu, 1)


def uses_muon(args: argparse.Namespace) -> bool:
    """Return whether the recipe's `optim` is Muon, which `TrainingArguments` does not know."""
    return args.trainer.get("optim") == MUON


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's section `trainer` as it may be printed and kept: without what opens the Hub."""
    hidden = (name for name, value in settings.items() if name.endswith("_token") and value is not None)
    return {**settings, **{name: f"<{name.upper()}>" for name in hidden}}


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """Return a command's arguments as its output keeps them: what they set is in the section `trainer`."""
    given = {name: value for name, value in vars(args).items() if name != "set"}
    return {**given, "trainer": without_secrets(args.trainer)}


def make_training_arguments(args: argparse.Namespace, **defaults: Any) -> TrainingArguments:
    """Return the recipe's settings of the Trainer over a command's defaults.

    A `hub_token` becomes this process's `HF_TOKEN`: the settings are pickled beside the weights, also on the Hub.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {
        "per_device_eval_batch_size": args.trainer["per_device_train_batch_size"],
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        **precision_fields(args.trainer, device),
        "eval_strategy": "steps",
        "eval_on_start": True,
        "report_to": [],
        **feeding_fields(device),
        **defaults,
        **args.trainer,
    }
    if token := fields.pop("hub_token", None):
        os.environ["HF_TOKEN"] = str(token)
    if uses_muon(args):
        for name in ("optim_args", "optim_target_modules"):
            if value := fields.get(name):
                raise InputError(
                    f"the recipe's section `trainer`: {name} = {value!r} is nothing for optim = {MUON!r}."
                )
        # the arguments' own optimizer is not created
        fields["optim"] = "adamw_torch"
    elif str(optim := fields["optim"]).lower() == MUON:
        raise InputError(f"the recipe's section `trainer`, optim: {optim!r} is unknown; did you mean {MUON!r}?")
    # whoever wants no evaluation wants none before the first step
    if str(fields["eval_strategy"]) == "no":
        fields["eval_on_start"] = args.trainer.get("eval_on_start", False)
    # other schedules know no lowest rate
    if fields.setdefault("lr_scheduler_type", SCHEDULE) == SCHEDULE:
        fields.setdefault("lr_scheduler_kwargs", {"min_lr_rate": 0.02})
    try:
        training_arguments = OneGpuArguments(output_dir=args.output, use_cpu=device == "cpu", **fields)
        _try_schedule(training_arguments)
    except (TypeError, ValueError, ImportError, OSError) as error:
        # torch and Transformers say it in many lines
        settings = without_secrets(args.trainer)
        raise InputError(f"the recipe's section `trainer`, {settings}: {one_line(error)}") from error
    for name, least in (("per_device_eval_batch_size", 1), ("dataloader_num_workers", 0)):
        if (number := getattr(training_arguments, name)) < least:
            raise InputError(f"the recipe's section `trainer`: {name} = {number} must be at least {least}.")
    check_precision(training_arguments)
    return training_arguments


def _try_schedule(training_arguments: TrainingArguments) -> None:
    """Make a schedule and throw it away: Trainer makes its own when all else is read."""
    num_steps = training_arguments.max_steps
    scheduler = get_scheduler(
        training_arguments.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=training_arguments.learning_rate),
        training_arguments.get_warmup_steps(num_steps),
        num_steps,
        training_arguments.lr_scheduler_kwargs,  # pyright: ignore[reportArgumentType]
    )
    # what is wrong with its settings may show behind the warm-up alone
    for rate in getattr(scheduler, "lr_lambdas", ()):
        rate(num_steps)


def make_trainer(kind: type[AnyTrainer], arguments: argparse.Namespace, **parts: Any) -> AnyTrainer:
    """Return a trainer, or raise what is wrong with a recipe's section `trainer` before the first step."""
    try:
        trainer = kind(**parts)
        _try_optimizer(trainer)
        return trainer
    except InputError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        # so do loggers of Transformers say it
        if isinstance(error, RuntimeError) and "to be installed" not in str(error):
            raise
        settings = without_secrets(arguments.trainer)
        raise InputError(f"the recipe's section `trainer`, {settings}: {one_line(error)}") from error


def _try_optimizer(trainer: Trainer) -> None:
    """Make an optimizer of torch and throw it away: Trainer makes its own when all else is read."""
    kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)  # pyright: ignore[reportArgumentType]
    if kind.__module__.startswith("torch."):
        kind([torch.zeros(1)], **settings)
