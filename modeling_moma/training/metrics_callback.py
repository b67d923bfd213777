# SPDX-License-Identifier: Apache-2.0
"""What the plain Trainer lacks: losses by modality and loads of experts in its logs, to choose a model by."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, SchedulerType, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from ..configuration_moma import MomaConfig
from ..depth_moma import DepthSelection, MomaDepthRouter
from ..errors_moma import InputError
from ..routing_moma import MomaRouter, Selection
from ..token_groups_moma import FixedSplit, is_distributed
from ..utils.hardware import keep_freed_memory, refuse_data_parallel


logger = logging.get_logger(__name__)


class MomaMetricsCallback(TrainerCallback):
    """Adds figures of modalities and experts to what `Trainer` logs.

    They are taken since its last log, for training and for evaluation apart:

    - `{modality}_loss`: mean cross-entropy of the modality's target tokens, in nats, unweighted;
    - `{group}_uncovered`, `{group}_covered_twice`: shares of the group's tokens that no expert, and that several
      experts took, of all layers and batches together;
    - `{group}_peak_load`: tokens of the busiest expert over the mean of its layer's experts, averaged over layers and
      batches;
    - `{modality}_depth_load`: share of the modality's tokens that a depth layer processed, averaged over these layers
      (one router serves all modalities, so their mix in a depth layer may drift away from the data's).

    `Trainer` tells the loggers of `report_to` before any other callback, so that they do not get these figures: give
    them behind this one, as `callbacks=[MomaMetricsCallback(), TensorBoardCallback()]`. `moma pretrain` does.

    Evaluation's keys have its prefix, `eval_`, and the set's name behind it where there are several. Forwards in
    training mode without gradients, as of samples that another callback draws, are left out. A training loss under
    `expert_choice` sees the future; the loss that `Trainer.evaluate` reports is causal. On several processes a plain
    `Trainer` fills up the last batch of an evaluation with documents that come again, and count again; `moma pretrain`
    leaves them out.

    Args:
        keep_freed_memory (`bool`, *optional*, defaults to `True`):
            In a training on a CPU, let the process keep freed memory, as `moma pretrain` does; see
            `modeling_moma.utils.hardware.keep_freed_memory`.
        averages_eval_loss (`bool`, *optional*, defaults to `False`):
            Log as `eval_loss` the mean over an evaluation's target tokens, as `moma pretrain` does. `Trainer` takes
            the mean over its batches' losses, which changes with the batch size where lengths differ. Before and after
            `train()` it still does, with a warning, unless `attach` was called.
    """

    def __init__(self, keep_freed_memory: bool = True, averages_eval_loss: bool = False):
        self._keeps_freed_memory, self._averages_eval_loss = keep_freed_memory, averages_eval_loss
        self._sums: dict[bool, dict] = {True: defaultdict(float), False: defaultdict(float)}
        self._handles: list[RemovableHandle] = []
        self._is_paused = False

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        """Start to listen to the model, and to no other that a training before left off at."""
        refuse_data_parallel(args)
        self.on_train_end(args, state, control)
        self._sums = {True: defaultdict(float), False: defaultdict(float)}
        self.attach(model)
        if self._keeps_freed_memory and args.device.type == "cpu":
            keep_freed_memory()

    def on_train_end(self, args, state, control, **kwargs):
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def attach(self, model: PreTrainedModel):
        """Listen to a `MomaForCausalLM`, if to none yet; `train()` calls this and ends it, `evaluate()` does not."""
        if self._handles:
            return
        self._handles.append(model.register_forward_hook(self._on_forward))
        for name, module in model.named_modules():
            if isinstance(module, MomaRouter):
                # "model.layers.0.mlp.groups.text.router", and more around it under an adapter
                group = name.rpartition(".groups.")[2].split(".")[0]
                self._handles.append(module.register_forward_hook(self._router_hook(group)))
            elif isinstance(module, MomaDepthRouter):
                modalities = model.config.modalities
                self._handles.append(module.register_forward_hook(self._depth_hook(modalities)))

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        """Put the averages into the log and start anew."""
        # "eval_", with the set's name where there are several, or what `Trainer.evaluate` was given
        timed = [key for key in logs if key.endswith("_runtime") and key != "train_runtime"]
        training = not timed and not any(key.startswith("eval_") for key in logs)
        if not training and self._averages_eval_loss and not self._handles:
            logger.warning_once(
                "`MomaMetricsCallback` listens while `train()` runs: this `eval_loss` is a mean over examples of the "
                "loss of their batch, and not over tokens. `callback.attach(model)` before `evaluate()` makes it one."
            )
        prefix = "" if training else min(timed, key=len, default="eval_runtime").removesuffix("runtime")
        metrics = {f"{prefix}{name}": value for name, value in self._averages(training).items()}
        # `Trainer` chooses the best model by what it gets back here
        logs.update(metrics)
        # Trainer has already filed a copy of the log
        if state.log_history:
            state.log_history[-1].update(metrics)

    def discard_evaluation(self):
        """Forget what was seen in evaluation mode since the last log, such as samples that were generated."""
        self._sums[False] = defaultdict(float)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what the model is given in the block."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _on_forward(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        losses = getattr(output, "modality_losses", None)
        is_sample = module.training and not torch.is_grad_enabled()
        if losses is None or is_sample or self._is_paused:
            return
        sums = self._sums[module.training]
        for modality, loss in losses.items():
            count = output.modality_tokens[modality].float()
            sums[f"{modality}_loss", "sum"] += loss * count
            sums[f"{modality}_loss", "count"] += count

    def _router_hook(self, group: str) -> Callable:
        @torch.no_grad()
        def on_route(module: MomaRouter, args: tuple, output: tuple[torch.Tensor, Selection]):
            context, (logits_NE, selection) = args[1], output
            is_sample = module.training and not context.track
            if is_sample or self._is_paused:
                return
            num_tokens = logits_NE.shape[0]
            # with a static cache a router scores the tokens of all groups: not counted
            if num_tokens == 0 or isinstance(context.split, FixedSplit):
                return
            load_E, taken_N = logits_NE.new_zeros(module.num_experts), logits_NE.new_zeros(num_tokens)
            is_pair_P = torch.ones_like(selection.weight_P)
            if selection.has_padding:
                is_pair_P = (selection.weight_P > 0).to(load_E)
            # bincount would wait for the device
            load_E.index_add_(0, selection.expert_P, is_pair_P)
            taken_N.index_add_(0, selection.token_P, is_pair_P)
            sums = self._sums[module.training]
            for name, value, number in (
                ("uncovered", (taken_N == 0).sum(), num_tokens),
                ("covered_twice", (taken_N > 1).sum(), num_tokens),
                ("peak_load", load_E.max() / load_E.mean().clamp(min=1e-9), 1.0),
            ):
                sums[f"{group}_{name}", "sum"] += value
                sums[f"{group}_{name}", "count"] += number

        return on_route

    def _depth_hook(self, modalities: list[str]) -> Callable:
        @torch.no_grad()
        def on_choose(module: MomaDepthRouter, args: tuple, output: tuple[torch.Tensor, DepthSelection]):
            context, (_, selection) = args[1], output
            is_sample = module.training and not context.track
            if is_sample or self._is_paused:
                return
            sums = self._sums[module.training]
            for index, modality in enumerate(modalities):
                is_token_BT = context.modality_BT == index
                if context.rows.padding_BT is not None:
                    is_token_BT = is_token_BT & ~context.rows.padding_BT
                sums[f"{modality}_depth_load", "sum"] += (selection.chosen_BT & is_token_BT).sum()
                sums[f"{modality}_depth_load", "count"] += is_token_BT.sum()

        return on_choose

    def _averages(self, training: bool) -> dict[str, float]:
        sums, self._sums[training] = self._sums[training], defaultdict(float)
        parts = [_as_numbers(sums)]
        if is_distributed():
            # gathered by name: a process without tokens of a modality has no figures for it
            own, parts = parts[0], [{}] * dist.get_world_size()
            dist.all_gather_object(parts, own)
        totals = defaultdict(float)
        for part in parts:
            for key, value in part.items():
                totals[key] += value
        if self._averages_eval_loss and not training:
            for name, part in [key for key in totals if key[0].endswith("_loss")]:
                totals["loss", part] += totals[name, part]
        names = sorted({name for name, _ in totals})
        return {name: totals[name, "sum"] / totals[name, "count"] for name in names if totals[name, "count"] > 0}


def evaluation_figures(config: MomaConfig) -> list[str]:
    """Return the names of the figures that an evaluation may give, without `eval_` and the name of a set."""
    names = ["loss", *(f"{modality}_loss" for modality in config.modalities)]
    if config.depth_layers:
        names += [f"{modality}_depth_load" for modality in config.modalities]
    routed = [group for group in config.expert_groups if config.group_num_experts(group) > 1]
    return names + [f"{group}_{load}" for group in routed for load in ("uncovered", "covered_twice", "peak_load")]


def check_best_metric(training_arguments: TrainingArguments, config: MomaConfig, held_out: Any) -> None:
    """Raise where something goes by a figure that no evaluation gives: the best model, or a schedule."""
    settings = {
        "load_best_model_at_end = True": training_arguments.load_best_model_at_end,
        "save_strategy = 'best'": training_arguments.save_strategy == SaveStrategy.BEST,
        "lr_scheduler_type = 'reduce_lr_on_plateau'": training_arguments.lr_scheduler_type
        == SchedulerType.REDUCE_ON_PLATEAU,
    }
    setting = next((name for name, is_set in settings.items() if is_set), None)
    if setting is None:
        return
    if held_out is None:
        raise InputError(
            f"RECIPE, trainer: {setting}, and no source has held-out documents to go by: give one a split "
            "`validation`, or a larger `held_out`."
        )
    if training_arguments.eval_strategy == IntervalStrategy.NO:
        raise InputError(f"RECIPE, trainer: {setting} goes by an evaluation, and eval_strategy = 'no': there is none.")
    sources = list(held_out) if isinstance(held_out, dict) else []
    metric = str(training_arguments.metric_for_best_model)
    figures = evaluation_figures(config)
    known = [f"{source}_{figure}" for source in sources for figure in figures] if sources else figures
    if metric.removeprefix("eval_") not in known:
        why = "each source has figures of its own" if sources else "no evaluation gives it"
        raise InputError(
            f"RECIPE, trainer: {setting} goes by metric_for_best_model = {metric!r}, but {why}: "
            f"name one, such as 'eval_{known[0]}'."
        )


def _as_numbers(values: Mapping[Any, torch.Tensor | float]) -> dict[Any, float]:
    """Return scalars as numbers, with one device sync for all of a device and a type."""
    numbers, alike = {}, defaultdict(dict)
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            alike[value.device, value.dtype][key] = value
        else:
            numbers[key] = float(value)
    for tensors in alike.values():
        numbers |= zip(tensors, map(float, torch.stack(list(tensors.values())).tolist()))
    return numbers
