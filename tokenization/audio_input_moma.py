# SPDX-License-Identifier: Apache-2.0
"""Sounds as files, data sets and libraries hold them, read into one form: mono samples at a codec's rate."""

import errno
import importlib
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.audio_utils import load_audio

from .processor_errors_moma import InputError


# A compressed file of hours is small, and its samples are not.
MAX_SECONDS = 600
MAX_SAMPLES = 1 << 26
# Of a sound's own rate: at one sample a second, the few of ten minutes would become millions.
MIN_RATE, MAX_RATE = 1_000, 384_000
# Of float samples, which are in [-1, 1] but for what resampling and filters add.
MAX_PEAK = 16.0
# what libsndfile says of a length that a file does not tell is above any
_UNKNOWN_FRAMES = 1 << 60
_REMOTE = ("http://", "https://", "data:audio/")
_EXTRA = 'pip install "modeling-moma[audio]"'


class SoundError(InputError):
    """A sound that cannot be read."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_sound(
    item: Any, sampling_rate: int, root: "str | os.PathLike | None" = None, max_samples: int = MAX_SAMPLES
) -> np.ndarray:
    """Read a sound as mono samples.

    Args:
        item (`Any`):
            Bytes of a file (WAV, FLAC, Ogg, MP3), also as a `memoryview`; its path, an `http(s)` address or
            `data:audio/` text; samples in [-1, 1] of shape `(num_samples,)`, or integers of 8, 16 or 32 bits and
            their full range, at `sampling_rate`; or what `datasets` has of one, `{"bytes": ..., "path": ...}` or
            `{"array": ..., "sampling_rate": ...}`.
        sampling_rate (`int`):
            Samples of one second that are asked for; files and arrays with a rate of their own are resampled.
        root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths start from.
        max_samples (`int`, *optional*, defaults to `MAX_SAMPLES`):
            Most samples of a file, of all its channels or resampled, which are held in memory.

    Returns:
        `np.ndarray` of shape `(num_samples,)`: float32, channels averaged.

    Raises:
        ValueError: the sound is missing, empty, damaged, not finite, louder than its type can be, longer than ten
            minutes or too large, or has a rate below 1,000 or above 384,000.
        ImportError: a file is to be read and the extra `audio` is not installed.
    """
    rate = None
    if isinstance(item, Mapping):
        rate = item.get("sampling_rate")
        samples = item.get("array")
        item = next((item[name] for name in ("bytes", "path") if item.get(name)), None) if samples is None else samples
    if isinstance(item, memoryview) and item.format == "B":
        item = item.tobytes()
    if item is None or (isinstance(item, (str, bytes, bytearray)) and not item):
        raise SoundError("sound missing", "there is nothing to read")
    if isinstance(item, (bytes, bytearray, str, os.PathLike)):
        samples = _read_file(item, sampling_rate, root, max_samples)
    else:
        if rate is not None:
            _check_rate(rate)
        samples = _resampled(_read_samples(item), sampling_rate if rate is None else rate, sampling_rate)
    if not len(samples):
        raise SoundError("sound empty", "it has no samples")
    if not np.isfinite(samples).all():
        raise SoundError("sound damaged", "some samples are not finite")
    _check_peak(samples)
    if len(samples) > MAX_SECONDS * sampling_rate:
        raise SoundError("sound too long", f"{len(samples) / sampling_rate:.0f} s, over {MAX_SECONDS}")
    return samples


def _read_samples(item: Any) -> np.ndarray:
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
        # of a type that NumPy lacks, too
        item = item.float() if item.is_floating_point() else item
    try:
        values = np.asarray(item)
    # parts of different lengths, such as a rate and samples
    except ValueError as error:
        raise SoundError("sound not readable", f"a {type(item).__name__} is no row of samples ({error})") from error
    if values.dtype.kind not in "fiu" or values.ndim != 1:
        raise SoundError(
            "sound not readable",
            f"samples have one axis and are numbers, got {type(item).__name__} of shape {values.shape} and type "
            f"{values.dtype}; pass one channel, or the path of a file",
        )
    if values.dtype.kind == "f":
        # before it becomes infinite in float32
        _check_peak(values)
        return values.astype(np.float32)
    # Python's own numbers become these, whatever range they had
    if values.dtype.itemsize > 4:
        raise SoundError(
            "sound not readable", f"samples of {values.dtype} tell no range: pass np.int16, np.int32 or floats"
        )
    limits = np.iinfo(values.dtype)
    middle = 0 if limits.min < 0 else (limits.max + 1) // 2
    return ((values.astype(np.float64) - middle) / (limits.max - middle)).astype(np.float32)


def _check_peak(samples: np.ndarray) -> None:
    peak = np.abs(samples).max(initial=0.0)
    if np.isfinite(peak) and peak > MAX_PEAK:
        raise SoundError(
            "sound not readable", f"float samples are in [-1, 1], and these reach {peak:g}: divide by their range"
        )


def _read_file(item: Any, sampling_rate: int, root: "str | os.PathLike | None", max_samples: int) -> np.ndarray:
    soundfile = _library("soundfile")
    if isinstance(item, str) and item.startswith(_REMOTE):
        try:
            return load_audio(item, sampling_rate, backend="soundfile").astype(np.float32)
        # whatever an address and what is behind it may do
        except Exception as error:
            raise SoundError("sound not read", f"{item[:100]!r} ({type(error).__name__}: {error})") from error
    if isinstance(item, (bytes, bytearray)):
        place, source = f"{len(item)} bytes", BytesIO(item)
    else:
        path = Path(root or "", item)
        try:
            is_there = path.is_file()
        # of names that are too long, or folders that may not be looked into
        except OSError as error:
            hint = "; is it the file's bytes in base64?" if error.errno == errno.ENAMETOOLONG else ""
            what = f"{str(item)[:100]!r} is no path of a file that can be read ({error.strerror}){hint}"
            raise SoundError("sound missing", what) from error
        if not is_there:
            raise SoundError("sound missing", f"there is no file {str(item)[:200]!r}")
        place, source = repr(str(item)), str(path)
    try:
        with soundfile.SoundFile(source) as file:
            samples, rate = _decoded(file, sampling_rate, max_samples), file.samplerate
    except SoundError:
        raise
    # a decoder may fail in any way
    except Exception as error:
        raise SoundError("sound damaged", f"{place} cannot be decoded as a sound ({error})") from error
    return _resampled(samples, rate, sampling_rate)


def _decoded(file: Any, sampling_rate: int, max_samples: int) -> np.ndarray:
    """Return the samples of an open file, channels averaged, at its own rate."""
    _check_rate(file.samplerate)
    count, samples, least = file.frames, None, ""
    # of a FLAC that was written as a stream, whose header tells no length
    if count >= _UNKNOWN_FRAMES:
        # it would look for a place behind the end
        file.seekable = lambda: False
        most = min(MAX_SECONDS * file.samplerate, max_samples // file.channels) + 1
        samples = file.read(most, dtype="float32", always_2d=True)
        count, least = len(samples), "at least "
    if count > MAX_SECONDS * file.samplerate:
        raise SoundError("sound too long", f"{least}{count / file.samplerate:.0f} s, over {MAX_SECONDS}")
    held = max(count * file.channels, count * sampling_rate // file.samplerate)
    if held > max_samples:
        raise SoundError("sound too large", f"{least}{held:,} samples, over {max_samples:,}")
    if samples is None:
        samples = file.read(dtype="float32", always_2d=True)
    return samples.mean(axis=1)


def _check_rate(rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)):
        raise SoundError("sound not readable", f"sampling_rate = {rate!r} is no number")
    if not MIN_RATE <= rate <= MAX_RATE:
        what = f"sampling_rate = {rate}: expected {MIN_RATE:,} to {MAX_RATE:,} samples a second"
        raise SoundError("sound not readable", f"{what}; the header of the file or the field is wrong")


def _resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted or not len(samples):
        return samples
    return _library("soxr").resample(samples, rate, wanted, quality="HQ").astype(np.float32)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"reading sounds needs {name}: {_EXTRA}.") from error
