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
        self.codes_V = {modality: frame.is_code(ids_V) for modality, frame in self.frames.items()}
        # what rows outside all frames may write
        self.outside_V = ~_all_codes(config)
        self.outside_V[[frame.end for frame in self.frames.values()]] = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = {modality: frame.open_codes(input_ids) for modality, frame in self.frames.items()}
        outside_B = torch.stack(list(counts.values())).amax(dim=0) < 0
        # copied in the first step alone
        self.outside_V = self.outside_V.to(scores.device)
        allowed_BV = outside_B[:, None] & self.outside_V
        for modality, count_B in counts.items():
            self.codes_V[modality] = self.codes_V[modality].to(scores.device)
            allowed_BV |= (count_B >= 0)[:, None] & self.codes_V[modality]
            if self.frames[modality].length is None:
                allowed_BV[:, self.frames[modality].end] |= count_B >= 1
        scores = scores.masked_fill(~allowed_BV, -torch.inf)
        is_last_place = input_ids.shape[1] + 1 >= self.max_length
        for modality, count_B in counts.items():
            frame = self.frames[modality]
            must_end_B = (count_B >= 1) & is_last_place if frame.length is None else count_B == frame.length
            scores = force_token(scores, must_end_B, frame.end)
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


class OneFrameLogitsProcessor(LogitsProcessor):
    """Outside a frame: its begin, as long as the row has not finished one, and then the end of the row.

    Args:
        frame (`ModalityFrame`): the frame that each row writes.
        prompt_length (`int`): positions of the prompt, whose own frames do not count.
        stop_token_id (`int`): token that ends a row.
    """

    def __init__(self, frame: ModalityFrame, prompt_length: int, stop_token_id: int):
        self.frame = frame
        self.prompt_length = prompt_length
        self.stop_token_id = stop_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        outside_B = self.frame.open_codes(input_ids) < 0
        done_B = (input_ids[:, self.prompt_length :] == self.frame.end).any(dim=1)
        scores = force_token(scores, outside_B & ~done_B, self.frame.begin)
        return force_token(scores, outside_B & done_B, self.stop_token_id)


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


def force_token(scores: torch.Tensor, rows_B: torch.Tensor, token_id: int) -> torch.Tensor:
    """Scores that leave one token to some of the rows."""
    # log-probability 0: a forced token costs a beam nothing, and is possible even where another processor forbade it
    forced = torch.full_like(scores, -torch.inf)
    forced[:, token_id] = 0.0
    return torch.where(rows_B[:, None], forced, scores)


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
