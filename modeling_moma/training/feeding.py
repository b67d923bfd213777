# SPDX-License-Identifier: Apache-2.0
"""How a training is fed: tokens per second, padding, time spent waiting for data, and the mixture of sources."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback


class FeedingCallback(TrainerCallback):
    """Adds to what `Trainer` logs in training, since its last log:

    - `tokens_per_second`: of all processes, evaluations and checkpoints left out of the time, padding of the tokens;
    - `padding_share`: share of the positions that hold no token;
    - `data_wait_share`: share of the time that this process waited for a batch;
    - `{source}_share`: where sources are packed together, that source's share of all tokens so far.

    Args:
        sources: names of the sources, in the order of `source_ids`.
    """

    def __init__(self, sources: Sequence[str] = ()):
        self.sources = list(sources)
        self.by_source = torch.zeros(len(self.sources), dtype=torch.long)
        self._started: float | None = None
        self._clear()

    def _clear(self):
        self.tokens = self.positions = 0
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
                known = source_ids[source_ids >= 0]
                self.tokens += known.numel()
                if len(self.sources) > 1:
                    self.by_source += torch.bincount(known.flatten(), minlength=len(self.sources)).cpu()
            else:
                self.tokens += int(batch["attention_mask"].sum())
            self.positions += batch["input_ids"].numel()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock until the next step begins."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        """Put the figures into the log and start anew."""
        if "loss" not in logs or not self.positions or not self.seconds:
            return
        figures = {
            "tokens_per_second": round(self.tokens * args.world_size / self.seconds, 1),
            "padding_share": round(1 - self.tokens / self.positions, 6),
            "data_wait_share": round(self.waited / self.seconds, 6),
        }
        if len(self.sources) > 1:
            shares = self.by_source / self.by_source.sum()
            figures |= {f"{name}_share": round(float(share), 5) for name, share in zip(self.sources, shares)}
        self._clear()
        logs.update(figures)
        # Trainer has already filed a copy of the log
        if state.log_history:
            state.log_history[-1].update(figures)


__all__ = ["FeedingCallback"]
