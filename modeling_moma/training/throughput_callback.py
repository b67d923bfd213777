# SPDX-License-Identifier: Apache-2.0
"""How a training is fed: tokens per second, padding, time spent waiting for data, and the mixture of sources."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.utils import logging

from ..data.packing import TOLERANCE
from ..token_groups_moma import is_distributed


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
