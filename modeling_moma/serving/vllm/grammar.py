# SPDX-License-Identifier: Apache-2.0
"""The grammar of frames one row and one token at a time, as servers need it: the rules of `generation_mode`.

`generate` reads a batch of equal length anew in every step. A server has rows of all lengths that come and go, so here
each row remembers where it stands. Both allow the same tokens (`tests/serving/vllm/test_grammar.py`).

Shape suffixes: V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...configuration_moma import MomaConfig
from ...errors_moma import InputError
from ...frames_moma import TEXT, ModalityFrame
from ...generation_moma import INTERLEAVED, TextOnlyLogitsProcessor


# the mode in which no grammar applies
FREE = "free"
# modes of the models that this process has been asked to serve
SERVED_MODES: set[str] = set()


def check_served(name: str, mode: Any) -> None:
    """Raise `ValueError` for a mode that no model has that this process has been asked to serve."""
    # `in` on a sorted list, since a request may give a list, which no set can look up
    if SERVED_MODES and mode not in sorted(SERVED_MODES):
        raise InputError(f"`{name}` must be one of {sorted(SERVED_MODES)}, got {mode!r}.")


@dataclass(frozen=True)
class Verdict:
    """What a row may write next.

    Attributes:
        forced (`int`, *optional*):
            the one token that it must write; the other fields then say nothing.
        mask (`str`):
            what it may write, a name in [`FrameGrammar.masks`].
        also (`int`, *optional*):
            one more token that it may write.
        banned (`tuple[int, ...]`):
            tokens of the mask that it may not write.
    """

    forced: int | None = None
    mask: str = TEXT
    also: int | None = None
    banned: tuple[int, ...] = ()


class FrameGrammar:
    """What all rows of a model share.

    Args:
        config (`MomaConfig`):
            gives the frames and the codes.

    Attributes:
        frames (`dict[str, ModalityFrame]`):
            the frames that rows may hold.
        stop (`int`, *optional*):
            token that ends a row after its frame.
        masks (`dict[str, torch.BoolTensor]`):
            tokens `[V]` that may be written in text mode (`"text"`), between frames (`"interleaved"`), and in a frame
            (by its modality).
    """

    def __init__(self, config: MomaConfig):
        self.frames: dict[str, ModalityFrame] = config.frames
        stop = config.eos_token_id if config.eos_token_id is not None else config.pad_token_id
        self.stop = stop[0] if isinstance(stop, list) else stop
        ids_V = torch.arange(config.vocab_size)
        text_V = ~TextOnlyLogitsProcessor(config).banned_V
        begin_V = torch.isin(ids_V, torch.tensor([frame.begin for frame in self.frames.values()]))
        self.masks = {TEXT: text_V, INTERLEAVED: text_V | begin_V}
        self.masks.update({modality: frame.is_code(ids_V) for modality, frame in self.frames.items()})

    @staticmethod
    def modes(config: MomaConfig) -> list[str]:
        """Return the values of `generation_mode` that a model has; `"free"` is no grammar."""
        return [TEXT, FREE, *([INTERLEAVED] if config.frames else []), *config.frames]

    def restrict(self, logits_BV: torch.Tensor, verdicts: dict[int, Verdict]) -> torch.Tensor:
        """Leave to some rows what their verdicts allow; in place."""
        rows_of: dict[Verdict, list[int]] = {}
        for row, verdict in verdicts.items():
            rows_of.setdefault(verdict, []).append(row)
        for verdict, rows in rows_of.items():
            row_R = torch.tensor(rows, device=logits_BV.device)
            if verdict.forced is not None:
                logits_BV.index_fill_(0, row_R, -torch.inf)
                # 0 also undoes a ban of another logits processor
                logits_BV[row_R, verdict.forced] = 0.0
                continue
            banned_V = ~self._mask(verdict).to(logits_BV.device)
            logits_BV.index_copy_(0, row_R, logits_BV.index_select(0, row_R).masked_fill_(banned_V, -torch.inf))
        return logits_BV

    def _mask(self, verdict: Verdict) -> torch.Tensor:
        mask_V = self.masks[verdict.mask]
        if verdict.also is not None or verdict.banned:
            mask_V = mask_V.clone()
            mask_V[list(verdict.banned)] = False
            if verdict.also is not None:
                mask_V[verdict.also] = True
        return mask_V


class FrameRow:
    """Where one row stands.

    Args:
        grammar (`FrameGrammar`):
            of its model.
        mode (`str`):
            `"text"`, `"interleaved"` or a modality that has a frame.
        prompt (`Sequence[int]`):
            ids of the prompt, which may end inside a frame.
        max_length (`int`):
            positions of the prompt and all that may be written.

    Raises:
        ValueError: the model has no such mode.
    """

    def __init__(self, grammar: FrameGrammar, mode: str, prompt: Sequence[int], max_length: int):
        if mode not in (TEXT, INTERLEAVED, *grammar.frames):
            raise InputError(f"`mode` must be one of {[TEXT, INTERLEAVED, *grammar.frames]}, got {mode!r}.")
        self.grammar = grammar
        self.mode = mode
        self.max_length = max_length
        self._begins = {frame.begin: modality for modality, frame in grammar.frames.items()}
        self._open: str | None = None
        self._num_codes = 0
        self._length = 0
        self.is_done = False
        self.write(prompt)
        # frames in the prompt do not end an answer of one image
        self.is_done = False

    def write(self, ids: Sequence[int]) -> None:
        """Go on by the tokens that were written."""
        for token in ids:
            if token in self._begins:
                self._open, self._num_codes = self._begins[token], 0
            elif self._open is not None and self._is_code(token):
                self._num_codes += 1
            else:
                self._open = None
            if self.mode in self.grammar.frames and token == self.grammar.frames[self.mode].end:
                self.is_done = True
        self._length += len(ids)

    def verdict(self) -> Verdict:
        """Return what may come next."""
        if self.mode == TEXT:
            return Verdict()
        if self._open is not None:
            return self._inside(self.grammar.frames[self._open])
        if self.mode == INTERLEAVED:
            room = self.max_length - self._length
            frames = self.grammar.frames.values()
            too_long = tuple(frame.begin for frame in frames if frame.fewest_codes + 2 > room)
            return Verdict(mask=INTERLEAVED, banned=too_long)
        return Verdict(forced=self.grammar.stop if self.is_done else self.grammar.frames[self.mode].begin)

    def _inside(self, frame: ModalityFrame) -> Verdict:
        if frame.length is not None:
            return Verdict(forced=frame.end) if self._num_codes >= frame.length else Verdict(mask=frame.modality)
        if self._num_codes == 0:
            return Verdict(mask=frame.modality)
        is_last_place = self._length + 1 >= self.max_length
        return Verdict(forced=frame.end) if is_last_place else Verdict(mask=frame.modality, also=frame.end)

    def _is_code(self, token: int) -> bool:
        ranges = self.grammar.frames[self._open].ranges  # pyright: ignore[reportArgumentType]
        return any(start <= token < stop for start, stop in ranges)
