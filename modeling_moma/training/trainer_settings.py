# SPDX-License-Identifier: Apache-2.0
"""The Trainer's settings of a recipe and of the command line, tried before the first step."""

import argparse
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.utils import logging

from ..errors_moma import InputError
from ..utils.hardware import check_precision, precision_fields
from ..utils.messages import one_line
from .muon import MUON
from .stage_trainer import StageTrainer
from .stages import feeding_fields


logger = logging.get_logger(__name__)

# the schedule of the learning rate where a recipe names none
SCHEDULE = "cosine_with_min_lr"


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


def make_training_arguments(args: argparse.Namespace) -> TrainingArguments:
    """Return the command line's and the recipe's settings of the Trainer.

    A `hub_token` becomes this process's `HF_TOKEN`: the settings are pickled beside the weights, also on the Hub.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate,
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        **precision_fields(args.bf16, device),
        "eval_strategy": "steps",
        "eval_steps": args.eval_steps,
        "eval_on_start": True,
        "prediction_loss_only": True,
        "save_steps": args.save_steps,
        "save_total_limit": args.save_total_limit,
        "logging_steps": args.logging_steps,
        "report_to": [],
        "seed": args.seed,
        **feeding_fields(device),
    }
    fields = {**fields, **args.trainer}
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


def make_trainer(arguments: argparse.Namespace, /, **parts: Any) -> StageTrainer:
    """Return a trainer, or raise what is wrong with a recipe's section `trainer` before the first step."""
    try:
        trainer = StageTrainer(**parts)
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


def _try_optimizer(trainer: StageTrainer) -> None:
    """Make an optimizer of torch and throw it away: Trainer makes its own when all else is read."""
    kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)  # pyright: ignore[reportArgumentType]
    if kind.__module__.startswith("torch."):
        kind([torch.zeros(1)], **settings)
