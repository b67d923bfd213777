# SPDX-License-Identifier: Apache-2.0
"""The Trainer of a stage: its optimizer, losses on any number of processes, where it stops, and how it is fed."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..data.packing import IGNORED, TOLERANCE
from ..errors_moma import InputError
from ..token_groups_moma import is_distributed
from .checkpoints import DEEPSPEED, SHARDS, WHOLE, last_checkpoint, read_state
from .freezing import freeze_all_but
from .metrics_callback import MomaMetricsCallback
from .muon import MUON, Muon, muon_groups


# rows after which shares are compared with the weights
ROWS = 300
_OF_PACKED = (
    "Captions and images are not cut, and may leave no room for one another in sequences of this length: a longer "
    "`sequence_length` helps, or weights that go with it."
)
_OF_DOCUMENTS = (
    "A row is one document, so that a source of rare, long ones is off by up to one of them, which counts for less "
    "the more rows there are; `packed: true` cuts texts to keep the weights from the start."
)

logger = logging.get_logger(__name__)


class ThroughputCallback(TrainerCallback):
    """Counts what a training is fed with, and gives [`StageTrainer`] the figures for its log.

    They are those since the last log:

    - `tokens_per_second`: of all processes, evaluations and checkpoints left out of the time, padding of the tokens;
    - `padding_share`: share of the positions that hold no token, in all processes;
    - `data_wait_share`: share of the time that this process waited for a batch;
    - `{source}_share`: where there are several sources, that source's share of all processes' tokens since these
      started, and beside it `{source}_weight`, the share that was asked for;
    - `{source}_epoch`: how many passes over a source the training has made, about, those before a resumption included.

    With one source `epoch` is the passes over it; with several there is none. A share that differs from its weight by
    more than 2 % of all tokens after 300 rows is warned of, once.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        epochs: Callable[[int], Sequence[float]] | None = None,
        examples_a_step: int = 1,
        is_packed: bool = True,
    ):
        total = sum((weights or {}).values())
        self.weights = {name: weight / total for name, weight in (weights or {}).items()}
        self.sources = list(self.weights)
        self.epochs, self.examples_a_step, self.is_packed = epochs, examples_a_step, is_packed
        # where the batches are, so that counting waits for no device
        self.by_source: torch.Tensor | int = 0
        self.rows, self._has_warned = 0, False
        self._started: float | None = None
        self._clear()

    def _clear(self):
        self.tokens: torch.Tensor | int = 0
        self.positions = 0
        self.waited = self.seconds = 0.0

    def on_batches(self, batches: Sequence[dict[str, torch.Tensor]], seconds: float):
        """Count the batches of a step, which were waited for so many seconds."""
        if not batches:
            return
        self._started = time.perf_counter() - seconds
        self.waited += seconds
        for batch in batches:
            source_ids = batch.get("source_ids")
            if source_ids is not None:
                self.tokens = self.tokens + (source_ids >= 0).sum()
                if len(self.sources) > 1:
                    index_S1 = torch.arange(len(self.sources), device=source_ids.device).unsqueeze(-1)
                    self.by_source = self.by_source + (source_ids.flatten() == index_S1).sum(1)
            else:
                self.tokens = self.tokens + batch["attention_mask"].sum()
            self.positions += batch["input_ids"].numel()
            self.rows += len(batch["input_ids"])

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock until the next step begins."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None

    def figures(self, step: int) -> dict[str, float]:
        """Return what the log is to say beside the losses, from when on all is counted anew."""
        if not self.positions or not self.seconds:
            return {}
        by_source, tokens, positions = self._of_all_processes()
        figures = {
            "tokens_per_second": round(tokens / self.seconds, 1),
            "padding_share": round(1 - tokens / positions, 6),
            "data_wait_share": round(self.waited / self.seconds, 6),
        }
        counted = int(by_source.sum())
        if counted:
            shares = dict(zip(self.sources, (by_source / counted).tolist()))
            for name, share in shares.items():
                figures |= {f"{name}_share": round(share, 5), f"{name}_weight": round(self.weights[name], 5)}
            self._compare(shares)
        if self.epochs is not None:
            passes = self.epochs(step * self.examples_a_step)
            figures |= {f"{name}_epoch": round(value, 4) for name, value in zip(self.sources, passes)}
        self._clear()
        return figures

    def _of_all_processes(self) -> tuple[torch.Tensor, int, int]:
        """Return the tokens of each source since the start, and tokens and positions since the last log."""
        by_source = torch.as_tensor(self.by_source).cpu().reshape(-1)
        own = [int(self.tokens), self.positions, *by_source.tolist()]
        parts = [own]
        if is_distributed():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, own)
        tokens, positions, *counts = (sum(column) for column in zip(*parts, strict=True))
        return torch.tensor(counts), tokens, positions

    def epoch(self, step: int) -> float | None:
        """Return the passes over the only source, `None` with several or where it is unknown."""
        if self.epochs is None or len(self.sources) != 1:
            return None
        return round(self.epochs(step * self.examples_a_step)[0], 4)

    def _compare(self, shares: dict[str, float]):
        off = {name: share for name, share in shares.items() if abs(share - self.weights[name]) > TOLERANCE}
        if off and self.rows >= ROWS and not self._has_warned:
            self._has_warned = True
            found = ", ".join(
                f"{name} {share:.3f} in place of {self.weights[name]:.3f}" for name, share in off.items()
            )
            logger.warning(
                f"the mixture is off after {self.rows} rows: {found} of the tokens. "
                f"{_OF_PACKED if self.is_packed else _OF_DOCUMENTS}"
            )


# bytes of a batch's fp32 logits above which the loss is computed from a few positions at a time
LARGEST_LOGITS = 2**28
# between the seeds of two processes, so that those of nearby trainings do not meet
SEED_STEP = 1_000_003


class StopAt(TrainerCallback):
    """End a training at a step of its schedule."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        """Stop and save at the step."""
        if state.global_step >= self.step:
            control.should_log = control.should_save = control.should_training_stop = True
        return control


class ArgumentsOverrideState(TrainerCallback, ExportableState):
    """Log, evaluate, save and choose the best model as the arguments say; a restored state goes by its own run's."""

    def __init__(self, first_step: int = 0):
        self.first_step = first_step
        self.chosen_by: list[Any] | None = None

    def state(self) -> dict[str, Any]:
        """Return what `Trainer` saves of it."""
        return {"args": {"first_step": self.first_step}, "attributes": {"chosen_by": self.chosen_by}}

    def on_train_begin(self, args, state: Any, control, **kwargs):
        """Put the intervals of the arguments into the state, and forget a best model that others have chosen."""
        state.compute_steps(args, state.max_steps)
        name = type(self).__name__
        before = state.stateful_callbacks.get(name, {}).get("attributes", {}).get("chosen_by")
        self.chosen_by = [args.metric_for_best_model, args.greater_is_better]
        if state.global_step <= self.first_step or before not in (None, self.chosen_by):
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        state.stateful_callbacks[name] = self.state()

    def on_step_end(self, args, state, control, **kwargs):
        """Log what is evaluated or saved, so that no checkpoint is written after a loss that is not finite."""
        control.should_log |= control.should_save or control.should_evaluate
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        """Log as at the end of a step."""
        return self.on_step_end(args, state, control)


class OwnRandomNumbers(TrainerCallback):
    """Give each process of a training random numbers of its own; a checkpoint brings those that it was written with.

    `Trainer` seeds all processes alike, and the n-th document of each would meet the same noise.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Seed all processes but the first one, whose numbers are those of a training by itself."""
        if args.process_index:
            torch.manual_seed(args.seed + SEED_STEP * args.process_index)


class ResumedTrainer(Trainer):
    """A Trainer that logs no loss of a start that had no step left to take, and stops where a loss is no number."""

    has_trained = False

    def log(self, logs, start_time=None):
        """Log, but no summary of a training without a step, and no loss that is no number."""
        self._check_finite(logs)
        if "train_loss" not in logs or self.has_trained:
            super().log(logs, start_time)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Take a training step, and note that there was one."""
        self.has_trained = True
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluate, and raise `ValueError` where what chooses the best model is not among the metrics."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        chosen_by = self.args.metric_for_best_model
        # several data sets are evaluated one by one, under longer prefixes
        if chosen_by and self.is_in_train and metric_key_prefix == "eval":
            name = f"eval_{chosen_by.removeprefix('eval_')}"
            # as of a modality that a source does not have
            if name not in metrics:
                raise InputError(f"metric_for_best_model = {name!r}: it is none of {sorted(metrics)}.")
        return metrics

    def _check_finite(self, logs: dict[str, Any]) -> None:
        """Raise where the loss since the last log, a mean over all processes, or the gradients' norm is not finite."""
        # fp16 passes over the steps whose gradients overflow
        names = {"loss": "loss"} if self.args.fp16 else {"loss": "loss", "grad_norm": "norm of the gradients"}
        for name, what in names.items():
            if not math.isfinite(value := float(logs.get(name) or 0.0)):
                kept = last_checkpoint(str(self.args.output_dir))
                raise InputError(
                    f"The {what} is {value} by step {self.state.global_step}: a lower `learning_rate` may help. "
                    + ("There is no checkpoint yet." if kept is None else f"The last checkpoint, {kept!r}, is kept.")
                )

    def uncounted(self) -> AbstractContextManager[Any]:
        """Return the context of a forward whose rows count nowhere."""
        return nullcontext()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Take an evaluation step, without the rows that fill up the last batch of several processes."""
        state = self.accelerator.gradient_state
        sampler = getattr(state.active_dataloader, "batch_sampler", None)
        is_filled_up = state.end_of_dataloader and state.remainder > 0
        # logits are gathered, for which they have to be alike in shape
        if not isinstance(sampler, BatchSamplerShard) or not is_filled_up or not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        num_rows = len(inputs["input_ids"])
        kept = min(max(state.remainder - sampler.process_index * num_rows, 0), num_rows)
        # every process takes the same number of forwards, though one may have no row left to count
        inputs = {name: values[: max(kept, 1)] for name, values in inputs.items()}
        if not kept:
            inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
        with nullcontext() if kept else self.uncounted():
            loss, *others = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.args.average_tokens_across_devices and self.model_accepts_loss_kwargs:
            # each process has its part of a sum over all, and the parts of the last ones would be dropped
            loss = self.accelerator.reduce(loss, "mean")
        return loss, *others


class StageTrainer(ResumedTrainer):
    """A Trainer whose optimizer and schedule begin where an earlier stage ended, and that measures how it is fed."""

    first_step, earlier_stage = 0, None
    feeding: ThroughputCallback | None = None
    metrics: MomaMetricsCallback | None = None
    undecayed: Sequence[str] = ()
    uses_muon = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and hasattr(self.model, "merge_and_unload"):
            raise InputError(
                "`--lora-rank` merges adapters into weights that FSDP and DeepSpeed would split: train under DDP."
            )
        self.add_callback(OwnRandomNumbers())
        # it adds to a log what the loggers of `report_to`, which stand before all others, are to be told
        self.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, MomaMetricsCallback))

    def train_only(self, groups: list[str]):
        """Freeze all but some expert groups and the rows of their tokens, see [`freeze_all_but`]."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                f"`--train-groups` {groups} trains single rows of the embeddings, which FSDP and DeepSpeed would "
                "split: train under DDP, or use `--freeze-groups`."
            )
        # decay would move the rows that do not learn
        self.undecayed = freeze_all_but(self.model, groups)  # pyright: ignore[reportArgumentType]

    def merge_adapters(self):
        """Make a plain model of one with PEFT's adapters, so that its own weights are saved."""
        self.model = self.model_wrapped = self.model.merge_and_unload()  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess, reportCallIssue]

    def checkpoint_kind(self) -> str | None:
        """Return what its checkpoints hold of a model under FSDP or DeepSpeed, see [`check_kind`]."""
        if self.is_deepspeed_enabled:
            return DEEPSPEED
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None:
            return None
        return SHARDS if "SHARDED" in str(plugin.state_dict_type) else WHOLE

    def chosen_checkpoint(self, last: str) -> str:
        """Return the checkpoint whose weights a finished run gives: the best one, or the last."""
        state = read_state(Path(last)) or {}
        followed = (state.get("stateful_callbacks") or {}).get(ArgumentsOverrideState.__name__, {})
        by = [self.args.metric_for_best_model, self.args.greater_is_better]
        is_chosen = self.args.load_best_model_at_end and followed.get("attributes", {}).get("chosen_by") == by
        best = state.get("best_model_checkpoint") if is_chosen else None
        # beside the last one, wherever the run lies now
        path = Path(last).with_name(Path(best or last).name)
        return str(path) if path.is_dir() else last

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the model, in one piece for `from_pretrained` where checkpoints are in shards, too."""
        if self.checkpoint_kind() == SHARDS and _internal_call:
            # which of them loads the best checkpoint, each process tells by whether its folder is there
            Path(output_dir or self.args.output_dir or ".").mkdir(parents=True, exist_ok=True)
        elif self.checkpoint_kind() == SHARDS:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # pyright: ignore[reportOptionalMemberAccess]
        super().save_model(output_dir, _internal_call)

    def get_decay_parameter_names(self, model):
        """Return the names of parameters with weight decay, `undecayed` left out."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self.undecayed]

    def create_optimizer(self, model=None):
        """Create the optimizer that the arguments name, or Muon."""
        if self.uses_muon and self.optimizer is None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise InputError(f"optim = {MUON!r} needs whole matrices, which FSDP and DeepSpeed split: use DDP.")
            model = self.model if model is None else model
            decayed = self.get_decay_parameter_names(model)
            self.optimizer = Muon(
                muon_groups(model, self.args.weight_decay, decayed),  # pyright: ignore[reportArgumentType]
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                divides_work=self.args.world_size > 1,
            )
        return super().create_optimizer(model)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the batches of a step, and count them."""
        began = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.feeding is not None:
            self.feeding.on_batches(batches, time.perf_counter() - began)
        return batches, num_items

    def log(self, logs, start_time=None):
        """Log, with the figures of what the training was fed with."""
        if self.feeding is None:
            return super().log(logs, start_time)
        if "loss" in logs:
            logs.update(self.feeding.figures(self.state.global_step))
        # Trainer counts all steps as one epoch, so the real number of passes is logged instead
        epoch, self.state.epoch = self.state.epoch, self.feeding.epoch(self.state.global_step)  # pyright: ignore[reportAttributeAccessIssue]
        super().log(logs, start_time)
        self.state.epoch = epoch

    def floating_point_ops(self, inputs):
        """Return 6 FLOPs for every position and parameter that a token meets, embeddings left out, for `total_flos`.

        `Trainer` counts all experts for every token.
        """
        config = self.model.config
        embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        return 6 * inputs["input_ids"].numel() * (config.num_parameters(active=True) - embeddings)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Take a training step, without `source_ids`."""
        # `source_ids` serve the figures alone: no model takes them
        inputs = {name: values for name, values in inputs.items() if name != "source_ids"}
        return super().training_step(model, inputs, num_items_in_batch)

    def uncounted(self) -> AbstractContextManager[Any]:
        """Return the context of a forward that the figures of its model leave out."""
        return nullcontext() if self.metrics is None else self.metrics.paused()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss, without all logits at once where they would be large."""
        if self._spares_logits(inputs):
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _spares_logits(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Return whether a batch's logits are too large to be made at once, by an unsharded head."""
        is_split = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile
        vocab_size = self.accelerator.unwrap_model(self.model).config.vocab_size
        return not is_split and inputs["input_ids"].numel() * vocab_size * 4 > LARGEST_LOGITS

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # the earlier stage's weights are in the model already, and under FSDP a plain model is no checkpoint
        if resume_from_checkpoint != self.earlier_stage:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint != self.earlier_stage:
            super()._load_optimizer_and_scheduler(checkpoint)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Create the schedule over this stage's own steps."""
        return super().create_scheduler(num_training_steps - self.first_step, optimizer)
