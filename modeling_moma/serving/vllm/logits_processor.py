# SPDX-License-Identifier: Apache-2.0
"""The grammar of frames as a logits processor of vLLM's first model runner."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger  # pyright: ignore[reportMissingImports]
from vllm.v1.sample.logits_processor import LogitsProcessor  # pyright: ignore[reportMissingImports]
from vllm.v1.sample.logits_processor.builtin import process_dict_updates  # pyright: ignore[reportMissingImports]

from ...frames_moma import TEXT
from .grammar import FREE, FrameGrammar, FrameRow, check_served


MODE = "generation_mode"
logger = init_logger(__name__)


@dataclass
class _Request:
    """A row, vLLM's list of what it has written, and how much of that list the row knows."""

    row: FrameRow
    written: list[int]
    known: int = 0


class MomaLogitsProcessor(LogitsProcessor):
    """Keeps every request to its `generation_mode`, as `generate` does.

    The mode stands in `SamplingParams(extra_args={"generation_mode": "image"})`, or in a request to the server in
    `"vllm_xargs": {"generation_mode": "image"}`. It is `"text"` (the default), `"image"` or another modality that
    has a frame, `"interleaved"`, or `"free"` for no grammar.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check the mode of a request."""
        check_served(MODE, _mode(sampling_params))

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        config = vllm_config.model_config.hf_config
        self.max_model_len = vllm_config.model_config.max_model_len
        self.modes = FrameGrammar.modes(config)
        # a model of text alone has nothing to forbid
        self.grammar = FrameGrammar(config) if config.modality_token_ranges else None
        self.requests: dict[int, _Request] = {}

    def is_argmax_invariant(self) -> bool:
        """Return False: it forbids tokens."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests that came, went and moved."""
        process_dict_updates(self.requests, batch_update, self._new_request)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Forbid what the rows may not write."""
        if not self.requests or self.grammar is None:
            return logits
        verdicts = {}
        for index, request in self.requests.items():
            request.row.write(request.written[request.known :])
            request.known = len(request.written)
            verdicts[index] = request.row.verdict()
        return self.grammar.restrict(logits, verdicts)

    def _new_request(self, params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> _Request | None:
        mode = _mode(params)
        if mode not in self.modes:
            # an error here would end the server for all of its clients
            logger.warning("`%s` must be one of %s, got %r; taken as %r.", MODE, self.modes, mode, TEXT)
            mode = TEXT
        if mode == FREE or self.grammar is None:
            return None
        prompt = prompt_ids or []
        room = self.max_model_len if params.max_tokens is None else params.max_tokens
        max_length = min(len(prompt) + room, self.max_model_len)
        return _Request(FrameRow(self.grammar, mode, prompt, max_length), output_ids)


def _mode(params: Any) -> str:
    return (params.extra_args or {}).get(MODE) or TEXT
