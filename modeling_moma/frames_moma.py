# SPDX-License-Identifier: Apache-2.0
"""The frame of a modality in a sequence: a token that begins it, codes, and a token that ends it.

Shape suffixes: B rows, T positions, N frames.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .errors_moma import InputError


TEXT = "text"
IMAGE = "image"
# `generation_mode` in which text and frames alternate freely
INTERLEAVED = "interleaved"
FRAME_FIELDS = ("begin", "end", "length")


@dataclass(frozen=True)
class ModalityFrame:
    """How the codes of one image, one sound or the like stand in a sequence."""

    modality: str
    ranges: tuple[tuple[int, int], ...]
    begin: int
    end: int
    length: int | None

    @property
    def fewest_codes(self) -> int:
        """Codes of the shortest frame."""
        return 1 if self.length is None else self.length

    def is_code(self, ids: torch.Tensor) -> torch.Tensor:
        """Return True where an id is a code of this modality."""
        return in_ranges(ids, self.ranges)

    def to_codes(self, ids: torch.Tensor) -> torch.Tensor:
        """Return code numbers, from 0, of ids that are codes."""
        codes = torch.zeros_like(ids)
        first = 0
        for start, stop in self.ranges:
            codes = torch.where((ids >= start) & (ids < stop), ids - start + first, codes)
            first += stop - start
        return codes

    def open_codes(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return how many codes each row has written of the frame that it is in, `[B]`; -1 for rows in none."""
        # one more column on the left, so that empty rows and rows of codes alone have a last id that is no code
        ids = nn.functional.pad(ids_BT, (1, 0), value=-1)
        places = torch.arange(ids.shape[1], device=ids.device)
        last_B = torch.where(self.is_code(ids), 0, places).amax(dim=1)
        inside_B = ids.gather(1, last_B[:, None])[:, 0] == self.begin
        count_B = ids.shape[1] - 1 - last_B
        if self.length is not None:
            count_B = count_B.clamp(max=self.length)
        return torch.where(inside_B, count_B, -1)

    def missing_tokens(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return fewest new tokens that complete a frame in each row, `[B]`, its begin included where none is open."""
        open_B = self.open_codes(ids_BT)
        return torch.where(open_B >= 0, (self.fewest_codes - open_B).clamp(min=0) + 1, self.fewest_codes + 2)

    def read_codes(self, ids_BT: torch.Tensor, name: str = "ids") -> torch.Tensor | list[torch.Tensor]:
        """Take the codes of all frames of this modality out of token ids, row by row, in order."""
        shape = tuple(getattr(ids_BT, "shape", ()))
        if len(shape) != 2:
            kind = type(ids_BT).__name__
            raise InputError(f"`{name}` must be a tensor of two dimensions, got a {kind} of the shape {shape}.")
        # one more column on the right, so that no frame runs on into the next row once rows are flattened
        ids = nn.functional.pad(ids_BT, (0, 1), value=-1)
        width, ids = ids.shape[1], ids.flatten()
        is_code = self.is_code(ids)
        others = (~is_code).nonzero()[:, 0]
        begin_N = (ids == self.begin).nonzero()[:, 0]
        stop_N = others[torch.searchsorted(others, begin_N, right=True)]
        count_N = stop_N - begin_N - 1
        fits_N = count_N >= 1 if self.length is None else count_N == self.length
        whole_N = fits_N & (ids[stop_N] == self.end)
        if not whole_N.all():
            bad = int((~whole_N).nonzero()[0])
            expected = "any number of codes" if self.length is None else f"{self.length} codes"
            raise InputError(
                f"`{name}`: the {self.modality} at row {int(begin_N[bad]) // width}, position "
                f"{int(begin_N[bad]) % width} is incomplete, with {int(count_N[bad])} codes before another token; it "
                f"has {expected} and then the token {self.end}. Generate with generation_mode={self.modality!r}."
            )
        outside = int(is_code.sum() - count_N.sum())
        if outside:
            raise InputError(
                f"`{name}`: {outside} codes stand outside the {len(begin_N)} frames of {self.modality} found. Pass "
                f"the sequences from the tokens {self.begin} on."
            )
        if self.length is None:
            return [self.to_codes(ids[begin + 1 : stop]) for begin, stop in zip(begin_N.tolist(), stop_N.tolist())]
        offsets = torch.arange(1, self.length + 1, device=ids.device)
        return self.to_codes(ids[begin_N[:, None] + offsets])


def problem_of_name(modality: str) -> str | None:
    """Return why no modality can have a name; `None` where one can."""
    if modality == TEXT:
        return "every id outside the ranges is text, which is not named"
    if modality == INTERLEAVED:
        return "this is a mode of generation beside those of modalities"
    if not modality or "." in modality or hasattr(nn.ModuleDict(), modality):
        return "torch takes it for no module's: choose one without a '.' that is no attribute of nn.ModuleDict"
    return None


def in_ranges(ids: torch.Tensor, ranges: Iterable[Sequence[int]]) -> torch.Tensor:
    """Return True where an id lies in one of the half-open ranges."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for start, stop in ranges:
        found |= (ids >= start) & (ids < stop)
    return found


def open_frame_codes(frames: dict[str, ModalityFrame], ids_BT: torch.Tensor) -> torch.Tensor:
    """Return how many codes each row has written of the frame that it is in, `[B]`; -1 for rows in none."""
    nothing_B = torch.full((ids_BT.shape[0],), -1, dtype=torch.long, device=ids_BT.device)
    return torch.stack([nothing_B, *(frame.open_codes(ids_BT) for frame in frames.values())]).amax(dim=0)
