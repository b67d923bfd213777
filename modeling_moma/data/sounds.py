# SPDX-License-Identifier: Apache-2.0
"""Sounds as data sets hold them; those that cannot be used are left out with a reason."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tokenization.audio_input_moma import SoundError, read_sound

from .images import SkippedRow


@contextmanager
def refused_sounds_left_out() -> Iterator[None]:
    """Raise [`SkippedRow`] for what `tokenization` raises of a sound that it cannot use."""
    try:
        yield
    except SoundError as error:
        raise SkippedRow(error.reason, error.detail) from error


def read_row_sound(value: Any, sampling_rate: int, root: str | None = None) -> np.ndarray:
    """Return the samples `[num_samples]` of a sound as a row holds it."""
    with refused_sounds_left_out():
        return read_sound(value, sampling_rate, root)
