# SPDX-License-Identifier: Apache-2.0
"""Words as sounds, spoken by espeak-ng."""

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import soundfile

from tokenization.audio_input_moma import read_sound


SAMPLING_RATE = 16000
# of the loudest sample, below which the ends of a sound are cut off
_SILENCE = 0.02
# samples that are kept before and behind what is loud enough, 20 ms
_MARGIN = 320


@dataclass(frozen=True)
class Voice:
    """A voice of espeak-ng: its name for `-v`, words a minute, and pitch from 0 to 99."""

    name: str
    speed: int
    pitch: int


VOICES = (
    Voice("en-us", 160, 50),
    Voice("en-us+m3", 150, 40),
    Voice("en-us+f2", 165, 55),
    Voice("en-us+f4", 145, 60),
    Voice("en-us+m7", 170, 45),
    Voice("en-gb", 155, 50),
    Voice("en-gb+f5", 150, 60),
    Voice("en-gb-x-rp+m1", 165, 35),
)


def choose_voices(name: str, number: int) -> list[Voice]:
    """Returns so many different voices, always the same ones for a name."""
    return sorted(VOICES, key=lambda voice: hashlib.sha256(f"{name}/{voice.name}".encode()).digest())[:number]


def speak(text: str, voice: Voice) -> np.ndarray:
    """
    Returns the samples of a text in [-1, 1], at `SAMPLING_RATE`, without silence around them.

    Raises:
        ValueError: espeak-ng is not installed, or said nothing.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise ValueError("espeak-ng is not installed; on Debian: apt-get install espeak-ng")
    command = [program, "-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch), "--stdout", "--", text]
    spoken = subprocess.run(command, capture_output=True, check=True).stdout
    samples = read_sound(spoken, SAMPLING_RATE)
    loud = np.flatnonzero(np.abs(samples) > _SILENCE * np.abs(samples).max())
    if not len(loud):
        raise ValueError(f"espeak-ng says nothing for {text!r}")
    return samples[max(0, loud[0] - _MARGIN) : loud[-1] + _MARGIN]


def as_flac(samples: np.ndarray) -> bytes:
    """Returns a file of samples, without loss but for 16 bits each."""
    file = BytesIO()
    soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()
