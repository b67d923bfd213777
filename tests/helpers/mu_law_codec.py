# SPDX-License-Identifier: Apache-2.0
"""A small real codec of sounds: mu-law, one code for each sample of mono audio at a low rate."""

import json
import wave
from pathlib import Path

import numpy as np

from tokenization import register_codec


@register_codec("mu_law")
class MuLawCodec:
    """Sounds to codes and back. Items are arrays of samples in [-1, 1], or paths of mono WAV files of 16 bits.

    Args:
        rate: samples, and so codes, of one second.
        bits: of a code.
        length: codes of every sound; any number without it.
    """

    def __init__(self, rate: int = 800, bits: int = 8, length: int | None = None):
        self.rate = rate
        self.bits = bits
        self.length = length
        self.num_codes = 2**bits

    def encode(self, items: list) -> list[list[int]]:
        top = self.num_codes - 1
        codes = []
        for item in items:
            samples = self.read(item) if isinstance(item, (str, Path)) else np.asarray(item, dtype=np.float64)
            if samples.ndim != 1:
                raise ValueError(f"items: a sound has one axis, its samples, got the shape {samples.shape}.")
            squeezed = np.sign(samples) * np.log1p(top * np.abs(samples).clip(max=1)) / np.log1p(top)
            codes.append(np.rint((squeezed + 1) / 2 * top).astype(int).tolist())
        return codes

    def decode(self, codes: list[int]) -> np.ndarray:
        top = self.num_codes - 1
        squeezed = np.asarray(codes) / top * 2 - 1
        return np.sign(squeezed) * np.expm1(np.abs(squeezed) * np.log1p(top)) / top

    def read(self, path) -> np.ndarray:
        with wave.open(str(path)) as file:
            found = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            if found != (1, 2, self.rate):
                raise ValueError(f"{path}: channels, bytes and rate are {found}, the codec needs {(1, 2, self.rate)}.")
            return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") / 32767

    def write(self, path, samples: np.ndarray):
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())

    def save_pretrained(self, folder):
        settings = {"rate": self.rate, "bits": self.bits, "length": self.length}
        (Path(folder) / "codec_config.json").write_text(json.dumps(settings))

    @classmethod
    def from_pretrained(cls, folder) -> "MuLawCodec":
        return cls(**json.loads((Path(folder) / "codec_config.json").read_text()))
