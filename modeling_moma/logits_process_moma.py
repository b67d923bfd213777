# SPDX-License-Identifier: Apache-2.0
"""Logits processors that keep what `generate` writes a valid mix of text and of frames of other modalities.

Whether a row stands inside a frame is read from its ids at every step, so that beams, drafted candidates and rows in
different states need no bookkeeping.

Shape suffixes: B rows, V vocabulary.
"""

import torch
from transformers.generation import LogitsProcessor, StoppingCriteria

from .configuration_moma import MomaConfig
from .frames_moma import ModalityFrame, in_ranges
from .host_moma import is_on_host


class FrameLogitsProcessor(LogitsProcessor):
    """Inside a frame only its codes and, when it may end, its end; outside neither codes nor ends.

    A frame of fixed length ends after its last code. One of any length may end after its first code, and must end
    where only one place is left.

    Args:
        config (`MomaConfig`): gives the frames, and the codes of modalities without one, which are never written.
        max_length (`int`): positions of the prompt and everything generated.
    """

    def __init__(self, config: MomaConfig, max_length: int):
        self.frames = config.frames
        self.max_length = max_length
        ids_V = torch.arange(config.vocab_size)
        outside_V = ~_all_codes(config)
        outside_V[[frame.end for frame in self.frames.values()]] = False
        allowed_SV = torch.stack([outside_V, *(frame.is_code(ids_V) for frame in self.frames.values())])
        # what rows may not write: outside all frames, and inside the frame of each modality
        self.banned_SV = ~allowed_SV

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._continued(input_ids, scores, [frame.open_codes(input_ids) for frame in self.frames.values()])

    def _continued(self, input_ids: torch.Tensor, scores: torch.Tensor, counts: list[torch.Tensor]) -> torch.Tensor:
        """Scores of what may come next, for the codes `[B]` that each row has written of a frame of each modality."""
        # copied in the first step alone
        self.banned_SV = self.banned_SV.to(scores.device)
        state_B = sum((count_B >= 0).long() * index for index, count_B in enumerate(counts, start=1))
        banned_BV = self.banned_SV.index_select(0, state_B)  # pyright: ignore[reportArgumentType]
        is_last_place = input_ids.shape[1] + 1 >= self.max_length
        frames = list(self.frames.values())
        for frame, count_B in zip(frames, counts):
            if frame.length is None:
                banned_BV[:, frame.end] &= count_B < 1
        scores = scores.masked_fill(banned_BV, -torch.inf)
        for frame, count_B in zip(frames, counts):
            must_end_B = (count_B >= 1) & is_last_place if frame.length is None else count_B == frame.length
            force_token_(scores, must_end_B, frame.end)
        return scores


class TextOnlyLogitsProcessor(LogitsProcessor):
    """Text only: never a code of any modality, nor the begin or end of a frame.

    Args:
        config (`MomaConfig`): gives the codes and the frames.
    """

    def __init__(self, config: MomaConfig):
        self.banned_V = _all_codes(config)
        for frame in config.frames.values():
            self.banned_V[[frame.begin, frame.end]] = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # copied in the first step alone
        self.banned_V = self.banned_V.to(scores.device)
        return scores.masked_fill(self.banned_V, -torch.inf)


class OneFrameLogitsProcessor(FrameLogitsProcessor):
    """Outside a frame: its begin, as long as the row has not finished one, and then the end of the row.

    Args:
        config (`MomaConfig`): gives the frames.
        max_length (`int`): positions of the prompt and everything generated.
        frame (`ModalityFrame`): the frame that each row writes.
        prompt_length (`int`): positions of the prompt, whose own frames do not count.
        stop_token_id (`int`): token that ends a row.
    """

    def __init__(
        self, config: MomaConfig, max_length: int, frame: ModalityFrame, prompt_length: int, stop_token_id: int
    ):
        super().__init__(config, max_length)
        self.frame = frame
        self.prompt_length = prompt_length
        self.stop_token_id = stop_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = [frame.open_codes(input_ids) for frame in self.frames.values()]
        scores = self._continued(input_ids, scores, counts)
        outside_B = counts[list(self.frames).index(self.frame.modality)] < 0
        done_B = (input_ids[:, self.prompt_length :] == self.frame.end).any(dim=1)
        force_token_(scores, outside_B & ~done_B, self.frame.begin)
        force_token_(scores, outside_B & done_B, self.stop_token_id)
        return scores


class FittingFrameLogitsProcessor(LogitsProcessor):
    """No begin of a frame where the shortest whole one no longer fits.

    Args:
        config (`MomaConfig`): gives the frames.
        max_length (`int`): positions of the prompt and everything generated.
    """

    def __init__(self, config: MomaConfig, max_length: int):
        self.frames = config.frames
        self.max_length = max_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        room = self.max_length - input_ids.shape[1]
        too_long = [frame.begin for frame in self.frames.values() if frame.fewest_codes + 2 > room]
        if too_long:
            scores = scores.clone()
            scores[:, too_long] = -torch.inf
        return scores


class FrameEndCriteria(StoppingCriteria):
    """A row ends with its frame: for beams, whose scores are means over all their tokens, a forced one included.

    Args:
        frame (`ModalityFrame`): the frame that each row writes.
        prompt_length (`int`): positions of the prompt, whose own frames do not count.
    """

    def __init__(self, frame: ModalityFrame, prompt_length: int):
        self.end_token_id = frame.end
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return (input_ids[:, -1] == self.end_token_id) & (input_ids.shape[1] > self.prompt_length)


def force_token_(scores: torch.Tensor, rows_B: torch.Tensor, token_id: int) -> None:
    """Leave one token to some of the rows."""
    # in most steps to none
    if is_on_host(rows_B) and not rows_B.any():
        return
    scores.masked_fill_(rows_B[:, None], -torch.inf)
    # log-probability 0: a forced token costs a beam nothing, and is possible even where another processor forbade it
    scores[:, token_id].masked_fill_(rows_B, 0.0)


def _all_codes(config: MomaConfig) -> torch.Tensor:
    ranges = [bounds for ranges in config.modality_token_ranges.values() for bounds in ranges]
    return in_ranges(torch.arange(config.vocab_size), ranges)


__all__ = [
    "FittingFrameLogitsProcessor",
    "FrameEndCriteria",
    "FrameLogitsProcessor",
    "OneFrameLogitsProcessor",
    "TextOnlyLogitsProcessor",
]
