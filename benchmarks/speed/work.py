# SPDX-License-Identifier: Apache-2.0
"""What is timed: a training step, its optimizer, a prefill, steps of decoding."""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import DynamicCache, PreTrainedModel

from benchmarks.speed.shapes import PACKINGS, Shape, mixed_tokens
from modeling_moma.documents_moma import packed_lengths


# steps of decoding in one piece of work, and the prompt before them
DECODE_STEPS = 16
PROMPT_LENGTH = 128


class Runner:
    """
    One model under one kind of work; `prepare()` is called before each timing, then `work()` is timed.

    Args:
        model: on its device.
        shape: gives the ids.
        kind: `"train"`, `"optimizer"`, `"prefill"` or `"decode"`.
        rows: of the batch.
        length: of the sequences.
        dtype: training runs under autocast to it with fp32 weights, as the Trainer does; inference with weights in it.
        text_share: share of words among the tokens.
        packing: a name of `PACKINGS`, by which rows hold several documents.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shape: Shape,
        kind: str,
        rows: int,
        length: int,
        dtype: torch.dtype,
        text_share: float = 0.5,
        packing: str | None = None,
    ):
        self.kind, self.dtype, self.device = kind, dtype, model.device
        self.tokens_per_work = rows * (DECODE_STEPS if kind == "decode" else length)
        is_training = kind in ("train", "optimizer")
        self.model = model.train(is_training) if is_training else model.to(dtype).eval()
        self._shape, self._rows, self._text_share, self._seed = shape, rows, text_share, 0
        self._total = PROMPT_LENGTH + DECODE_STEPS if kind == "decode" else length
        self._next_tokens()
        self.more: dict[str, Any] = {}
        if packing:
            position_ids = PACKINGS[packing](rows, length)
            # as a training brings them: flash attention goes by lengths
            self.more = {"position_ids": position_ids.to(self.device)}
            if "flash" in (model.config._attn_implementation or ""):
                self.more |= send_to_device(dict(packed_lengths(position_ids)), self.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) if kind == "optimizer" else None
        self.cache: DynamicCache | None = None

    def _next_tokens(self) -> None:
        ids_BT = mixed_tokens(self._shape, self._rows, self._total, self._text_share, seed=self._seed)
        self.ids_BT = ids_BT.to(self.device)
        self._seed += 1

    def prepare(self) -> None:
        """What a timing needs and does not count; each time there are other tokens, the same for every contender."""
        self._next_tokens()
        if self.kind == "train":
            self.model.zero_grad()
        elif self.kind == "optimizer":
            self._step()
        elif self.kind == "decode":
            self.cache = DynamicCache(config=self.model.config)
            self._read(self.ids_BT[:, :PROMPT_LENGTH])

    def work(self) -> None:
        """What is timed."""
        if self.kind == "train":
            self._step()
        elif self.optimizer is not None:
            self.optimizer.step()
        elif self.kind == "prefill":
            self.cache = DynamicCache(config=self.model.config)
            self._read(self.ids_BT)
        else:
            for place in range(PROMPT_LENGTH, PROMPT_LENGTH + DECODE_STEPS):
                self._read(self.ids_BT[:, place : place + 1])

    def _step(self) -> None:
        is_fp32 = self.dtype == torch.float32
        with nullcontext() if is_fp32 else torch.autocast(self.device.type, self.dtype):
            loss = self.model(input_ids=self.ids_BT, labels=self.ids_BT, use_cache=False, **self.more).loss
        loss.backward()

    @torch.no_grad()
    def _read(self, ids_BT: torch.Tensor) -> None:
        self.model(input_ids=ids_BT, cache=self.cache, use_cache=True, logits_to_keep=1, **self.more)
