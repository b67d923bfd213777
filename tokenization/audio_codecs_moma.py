# SPDX-License-Identifier: Apache-2.0
"""Codecs of sounds: a small one by mel spectrograms, and those of Transformers (EnCodec, DAC, Mimi)."""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.audio_utils import mel_filter_bank
from transformers.utils.generic import maybe_autocast

from .audio_input_moma import read_sound
from .codecs_moma import register_codec
from .processor_errors_moma import InputError


CONFIG_FILE, WEIGHTS_FILE = "codec_config.json", "codebook.safetensors"
AUDIO = "audio"
# Loudness that sounds are brought to: the root of the mean square of the samples.
_LOUDNESS = 0.1
# Of a band of the spectrogram, so that silence has a logarithm.
_FLOOR = 1e-3
# Rounds of Griffin and Lim's search for the phases of a spectrogram.
_PHASE_ROUNDS = 64
# A mel spectrogram is computed there, whatever torch's default device is.
_CPU = torch.device("cpu")
# Vectors that are compared with the codebook at once.
_CHUNK = 8192


@register_codec("mel")
class MelCodec:
    """Sounds as codes of their mel spectrogram: one code for a few neighbouring frames, the nearest in a codebook.

    Loudness is not coded. What `decode` gives has phases found by Griffin and Lim's search, so that it sounds like
    its spectrogram, and no more.

    Args:
        codebook (`torch.FloatTensor` of shape `(num_codes, frames_per_code * num_mels)`):
            Logarithms of mel spectrograms, frame by frame; `moma train-audio-tokenizer` learns it.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Samples of one second.
        hop_length (`int`, *optional*, defaults to 200):
            Samples from one frame to the next.
        win_length (`int`, *optional*, defaults to 640):
            Samples of a frame.
        num_mels (`int`, *optional*, defaults to 40):
            Bands of a frame.
        frames_per_code (`int`, *optional*, defaults to 3):
            Frames that a code stands for: by default 37.5 ms.

    Attributes:
        num_codes (`int`):
            Number of different codes.
        length (`None`):
            The number of codes follows from the length of a sound.

    Raises:
        ValueError: the codebook does not fit the other arguments or is not finite, frames do not overlap by half, or
            there are more bands than frequencies to fill them.
    """

    codec_type: str
    length = None
    SETTINGS = ("sampling_rate", "hop_length", "win_length", "num_mels", "frames_per_code")

    def __init__(
        self,
        codebook: torch.Tensor,
        sampling_rate: int = 16000,
        hop_length: int = 200,
        win_length: int = 640,
        num_mels: int = 40,
        frames_per_code: int = 3,
    ):
        if codebook.ndim != 2 or codebook.shape[1] != frames_per_code * num_mels or not len(codebook):
            raise InputError(
                f"codebook: its shape is {tuple(codebook.shape)}, for frames_per_code={frames_per_code} of "
                f"num_mels={num_mels} it must be (num_codes, {frames_per_code * num_mels})."
            )
        if not torch.isfinite(codebook).all():
            raise InputError("codebook: it holds NaN or infinite values; was its file damaged?")
        if hop_length < 1 or win_length < 2 * hop_length:
            raise InputError(
                f"hop_length = {hop_length}, win_length = {win_length}: a frame must reach over two hops at least, or "
                "no sound could be made of frames."
            )
        self.codebook = codebook.float()
        self.sampling_rate, self.hop_length, self.win_length = sampling_rate, hop_length, win_length
        self.num_mels, self.frames_per_code = num_mels, frames_per_code
        self.num_codes = len(codebook)
        if not self._filters.any(dim=0).all():
            raise InputError(
                f"num_mels: {num_mels} bands are more than win_length={win_length} samples tell apart at "
                f"sampling_rate={sampling_rate}; ask for fewer, or for a longer window."
            )

    @classmethod
    def untrained(cls, **settings: Any) -> "MelCodec":
        """Return a codec of one code, whose spectrograms a codebook can be learnt from."""
        size = settings.get("frames_per_code", 3) * settings.get("num_mels", 40)
        return cls(torch.zeros(1, size), **settings)

    @cached_property
    def _filters(self) -> torch.Tensor:
        # the power of two that holds a frame
        bins = self._fft_length // 2 + 1
        with warnings.catch_warnings():
            # of bands that stay empty, which are an error here
            warnings.simplefilter("ignore")
            filters = mel_filter_bank(
                bins, self.num_mels, 0.0, self.sampling_rate / 2, self.sampling_rate, "slaney", "slaney"
            )
        return torch.from_numpy(filters).float()

    @property
    def _fft_length(self) -> int:
        return 1 << (self.win_length - 1).bit_length()

    def log_mels(self, item: Any) -> torch.Tensor:
        """Return the vectors that stand before the choice of codes.

        Args:
            item (`Any`):
                A sound, see [`read_sound`].

        Returns:
            `torch.FloatTensor` of shape `(num_codes, frames_per_code * num_mels)`.

        Raises:
            ValueError: the sound cannot be read.
        """
        samples = torch.from_numpy(np.array(read_sound(item, self.sampling_rate)))
        loudness = samples.square().mean().sqrt()
        if loudness > 1e-5:
            samples = samples * (_LOUDNESS / loudness)
        step = self.hop_length * self.frames_per_code
        count = -(-len(samples) // step)
        samples = torch.nn.functional.pad(samples, (0, count * step - len(samples)))
        # the last frame begins where the sound ends
        power = self._spectrogram(samples).abs().square()[:, :-1]
        mels = (power.T @ self._filters).clamp(min=_FLOOR).log()
        return mels.reshape(count, -1)

    def encode(self, items: list) -> list[list[int]]:
        """Turn sounds into codes.

        Args:
            items (`list`):
                Sounds, see [`read_sound`].

        Returns:
            `list[list[int]]`: the codes of each, one for every `hop_length * frames_per_code` samples begun.

        Raises:
            ValueError: a sound cannot be read.
        """
        codes = []
        for item in items:
            # in the types of autocast other codes are nearest
            with maybe_autocast("cpu", enabled=False), _CPU:
                chunks = self.log_mels(item).split(_CHUNK)
            codes.append([code for chunk in chunks for code in torch.cdist(chunk, self.codebook).argmin(1).tolist()])
        return codes

    def decode(self, codes: list[int]) -> np.ndarray:
        """Turn codes into samples.

        Args:
            codes (`list[int]`):
                Codes of one sound, in `[0, num_codes)`.

        Returns:
            `np.ndarray` of shape `(num_samples,)`: float32 in [-1, 1] at `sampling_rate`.
        """
        with _CPU:
            mels = self.codebook[torch.as_tensor(codes)].reshape(-1, self.num_mels).exp()
            power = (mels @ torch.linalg.pinv(self._filters)).clamp(min=0)
            samples = self._with_phases(power.sqrt().T)
        peak = samples.abs().max()
        return (samples / peak if peak > 1 else samples).numpy()

    def _spectrogram(self, samples: torch.Tensor) -> torch.Tensor:
        size, window = self._fft_length, torch.hann_window(self.win_length)
        # reflection would need more samples than a short sound has
        return torch.stft(
            samples, size, self.hop_length, self.win_length, window, pad_mode="constant", return_complex=True
        )

    def _with_phases(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Return samples with about this spectrogram `(bins, frames)`, by Griffin and Lim's search with momentum."""
        size, window = self._fft_length, torch.hann_window(self.win_length)
        num_samples = magnitude.shape[1] * self.hop_length
        magnitude = torch.nn.functional.pad(magnitude, (0, 1))
        phases = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
        angles, before = torch.polar(torch.ones_like(phases), phases), torch.zeros((), dtype=torch.complex64)
        for _ in range(_PHASE_ROUNDS):
            samples = torch.istft(
                magnitude * angles, size, self.hop_length, self.win_length, window, length=num_samples
            )
            now = self._spectrogram(samples)
            angles = now - 0.99 / 1.99 * before
            angles, before = angles / angles.abs().clamp(min=1e-12), now
        return torch.istft(magnitude * angles, size, self.hop_length, self.win_length, window, length=num_samples)

    def settings(self) -> dict[str, int]:
        """Return the arguments of the class, but for the codebook."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    def save_pretrained(self, folder: "str | os.PathLike"):
        """Write the settings and the codebook.

        Args:
            folder (`str` or `os.PathLike`):
                The folder, which exists.
        """
        Path(folder, CONFIG_FILE).write_text(json.dumps({"codec_type": self.codec_type, **self.settings()}, indent=2))
        # `save_file` would let the owner alone read it
        Path(folder, WEIGHTS_FILE).write_bytes(save({"codebook": self.codebook}))

    @classmethod
    def from_pretrained(cls, folder: "str | os.PathLike") -> "MelCodec":
        """Read what `save_pretrained` has written.

        Args:
            folder (`str` or `os.PathLike`):
                The folder.
        """
        settings = json.loads(Path(folder, CONFIG_FILE).read_text())
        settings.pop("codec_type", None)
        return cls(load_file(Path(folder, WEIGHTS_FILE))["codebook"], **settings)


def _encode_encodec(model: Any, samples: torch.Tensor, codebooks: int) -> torch.Tensor:
    return model.encode(samples, bandwidth=_bandwidths(model)[codebooks]).audio_codes[0]


def _bandwidths(model: Any) -> dict[int, float]:
    """Return EnCodec's bandwidths by the codebooks that each of them uses."""
    quantizer = model.quantizer
    return {
        min(quantizer.get_num_quantizers_for_bandwidth(value), len(quantizer.layers)): value
        for value in model.config.target_bandwidths
    }


@dataclass(frozen=True)
class LibraryCodec:
    """A class of Transformers that turns sounds into codes and back.

    Args:
        name (`str`):
            of the class in `transformers`.
        encode (`Callable`):
            model, samples `(1, 1, num_samples)` and number of codebooks to codes `(1, codebooks, frames)`.
        decode (`Callable`):
            model and codes `(1, codebooks, frames)` to what holds `audio_values`.
        codebooks (`Callable`):
            model to the numbers of codebooks that it can use.
        hop_length (`Callable`):
            configuration to the samples of a frame, which sounds are filled up to.
    """

    name: str
    encode: Callable[[Any, torch.Tensor, int], torch.Tensor]
    decode: Callable[[Any, torch.Tensor], Any]
    codebooks: Callable[[Any], list[int]]
    hop_length: Callable[[Any], int]


# by `model_type`
LIBRARY_CODECS = {
    "encodec": LibraryCodec(
        "EncodecModel",
        _encode_encodec,
        lambda model, codes: model.decode(codes[None], [None]),
        lambda model: list(_bandwidths(model)),
        lambda config: 1,
    ),
    "dac": LibraryCodec(
        "DacModel",
        lambda model, samples, codebooks: model.encode(samples, n_quantizers=codebooks).audio_codes,
        lambda model, codes: model.decode(audio_codes=codes),
        lambda model: list(range(1, model.config.n_codebooks + 1)),
        lambda config: config.hop_length,
    ),
    "mimi": LibraryCodec(
        "MimiModel",
        lambda model, samples, codebooks: model.encode(samples, num_quantizers=codebooks).audio_codes,
        lambda model, codes: model.decode(codes),
        lambda model: list(range(1, model.config.num_quantizers + 1)),
        lambda config: 1,
    ),
}


@register_codec("transformers")
class LibraryAudioCodec:
    """A codec of Transformers: `EncodecModel`, `DacModel` or `MimiModel`.

    Their frames have a code of each codebook. These stand one after the other, and each codebook has a range of codes
    of its own: code `c` of codebook `q` is `q * codebook_size + c`. What a model generated is read by the place of a
    code in its frame, modulo the codebook's size; a frame that is not complete at the end is left out.

    Args:
        model (`PreTrainedModel`):
            The library's model, of mono sounds whose loudness is not scaled.
        num_codebooks (`int`, *optional*):
            How many codebooks are used; by default the fewest that the model can, for EnCodec those of its lowest
            bandwidth.

    Attributes:
        num_codes (`int`):
            Number of different codes, `num_codebooks * codebook_size`.
        length (`None`):
            The number of codes follows from the length of a sound.
        sampling_rate (`int`):
            Samples of one second.

    Raises:
        TypeError: the model is of another class.
        ValueError: it is one of stereo sounds, or of chunks, or cannot use so many codebooks.
    """

    codec_type: str
    length = None

    def __init__(self, model: PreTrainedModel, num_codebooks: int | None = None):
        config: Any = getattr(model, "config", None)
        kind = LIBRARY_CODECS.get(getattr(config, "model_type", ""))
        if kind is None:
            raise TypeError(f"model: {type(model).__name__} {_why_no_codec()}.")
        if getattr(config, "audio_channels", 1) != 1 or getattr(config, "normalize", False):
            raise InputError(
                f"model: this {kind.name} has audio_channels={config.audio_channels}, "
                f"normalize={getattr(config, 'normalize', False)}; codes alone give back mono sounds that are not "
                "scaled, such as those of facebook/encodec_24khz."
            )
        if getattr(config, "chunk_length_s", None) is not None:
            raise InputError(
                f"model: this {kind.name} has chunk_length_s={config.chunk_length_s}, and the codes of a chunk give "
                "back no more than this: it needs `None`, as facebook/encodec_24khz has it."
            )
        possible = sorted(kind.codebooks(model))
        self.num_codebooks = possible[0] if num_codebooks is None else num_codebooks
        if self.num_codebooks not in possible:
            raise InputError(f"num_codebooks: {num_codebooks!r} is none that this {kind.name} can use, {possible}.")
        self.kind, self.model = kind, model.float().eval()
        self.codebook_size: int = config.codebook_size
        self.num_codes = self.num_codebooks * self.codebook_size
        self.sampling_rate: int = config.sampling_rate

    def to(self, device: "str | torch.device") -> "LibraryAudioCodec":
        """Move the model."""
        self.model.to(device)  # pyright: ignore[reportArgumentType]
        return self

    @torch.no_grad()
    def encode(self, items: list) -> list[list[int]]:
        """Turn sounds into codes, each alone, so that its codes depend on no other.

        Args:
            items (`list`):
                Sounds, see [`read_sound`].

        Returns:
            `list[list[int]]`: the codes of each, frame by frame.

        Raises:
            ValueError: a sound cannot be read.
        """
        hop, rows = self.kind.hop_length(self.model.config), []
        for item in items:
            samples = torch.from_numpy(np.array(read_sound(item, self.sampling_rate)))
            samples = torch.nn.functional.pad(samples, (0, -len(samples) % hop))
            samples = samples[None, None].to(self.model.device)
            # in the types of autocast other codes are nearest
            with maybe_autocast(samples.device.type, enabled=False):
                codes_QT = self.kind.encode(self.model, samples, self.num_codebooks)[0]
            offsets = torch.arange(self.num_codebooks, device=codes_QT.device) * self.codebook_size
            rows.append((codes_QT.T + offsets).flatten().tolist())
        return rows

    @torch.no_grad()
    def decode(self, codes: list[int]) -> np.ndarray:
        """Turn codes into samples.

        Args:
            codes (`list[int]`):
                Codes of one sound, in `[0, num_codes)`.

        Returns:
            `np.ndarray` of shape `(num_samples,)`: float32 at `sampling_rate`.

        Raises:
            ValueError: there is not one whole frame.
        """
        frames = len(codes) // self.num_codebooks
        if not frames:
            raise InputError(
                f"codes: one frame of this codec has {self.num_codebooks} codes, got {len(codes)} in all."
            )
        codes_TQ = torch.tensor(codes[: frames * self.num_codebooks]).view(frames, self.num_codebooks)
        codes_TQ = (codes_TQ % self.codebook_size).to(self.model.device)
        return self.kind.decode(self.model, codes_TQ.T[None]).audio_values.flatten().float().cpu().numpy()

    def save_pretrained(self, folder: "str | os.PathLike"):
        """Write the library's model, and how many codebooks are used.

        Args:
            folder (`str` or `os.PathLike`):
                The folder, which exists.
        """
        self.model.save_pretrained(folder)
        content = {"codec_type": self.codec_type, "num_codebooks": self.num_codebooks}
        Path(folder, CONFIG_FILE).write_text(json.dumps(content, indent=2))

    @classmethod
    def from_pretrained(cls, folder: "str | os.PathLike") -> "LibraryAudioCodec":
        """Read what `save_pretrained` has written.

        Args:
            folder (`str` or `os.PathLike`):
                The folder.
        """
        settings = json.loads(Path(folder, CONFIG_FILE).read_text())
        return cls(AutoModel.from_pretrained(folder, dtype=torch.float32), settings["num_codebooks"])


def load_audio_codec(
    place: "str | os.PathLike", num_codebooks: int | None = None, **kwargs: Any
) -> MelCodec | LibraryAudioCodec:
    """Load a codec of sounds; the files say of which class.

    Args:
        place (`str` or `os.PathLike`):
            Folder of a [`MelCodec`] or a [`LibraryAudioCodec`]; or folder or Hub name of an EnCodec, a DAC or a Mimi.
        num_codebooks (`int`, *optional*):
            How many codebooks of one of these are used, see [`LibraryAudioCodec`].
        kwargs (`Any`):
            Further arguments of `from_pretrained`.

    Returns:
        [`MelCodec`] or [`LibraryAudioCodec`].

    Raises:
        TypeError: the model is of another class.
        ValueError: a codebook is chosen of a codec that has one.
    """
    settings_file = Path(place, CONFIG_FILE)
    if settings_file.is_file():
        settings = json.loads(settings_file.read_text())
        if settings.get("codec_type") == MelCodec.codec_type:
            if num_codebooks not in (None, 1):
                raise InputError(f"num_codebooks: {num_codebooks} of the codec in {str(place)!r}, which has one.")
            return MelCodec.from_pretrained(place)
        if num_codebooks is None:
            num_codebooks = settings.get("num_codebooks")
    model_type = PreTrainedConfig.get_config_dict(place, **kwargs)[0].get("model_type")
    if model_type not in LIBRARY_CODECS:
        raise TypeError(f"{place}: a model of type {model_type!r} {_why_no_codec()}.")
    model = AutoModel.from_pretrained(place, dtype=torch.float32, **kwargs)
    return LibraryAudioCodec(model, num_codebooks)


def _why_no_codec() -> str:
    known = ", ".join(["MelCodec", *(kind.name for kind in LIBRARY_CODECS.values())])
    return f"gives no codes that could be decoded again; a codec of sounds is one of {known}"
