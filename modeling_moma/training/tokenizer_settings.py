# SPDX-License-Identifier: Apache-2.0
"""Settings of trainings of tokenizers: fields of a recipe, and what a resumed run must repeat."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ..errors_moma import InputError
from ..utils.fields import Count, Int, NotNegative, OnOff, Seed, refuse_unknown


if TYPE_CHECKING:
    from tokenization import MomaVQConfig

DEFAULT_PRESET = "small"


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Fields of a recipe's section `image_tokenizer`.

    Args:
        config (`str | dict[str, Any]`, *optional*):
            a preset (full, small, medium-256, medium-1024), a JSON file, or a mapping of fields of MomaVQConfig and
            perhaps `preset`, the one that they change; small by default.
        steps (`int`, *optional*, defaults to `2400`):
            steps of the optimizer.
        batch_size (`int`, *optional*, defaults to `48`):
            images of a step.
        learning_rate (`float`, *optional*, defaults to `0.0015`):
            largest one of the schedule.
        warmup_steps (`int`, *optional*, defaults to `100`):
            steps in which the learning rate rises.
        seed (`int`, *optional*, defaults to `0`):
            of weights, order and augmentation.
        save_every (`int`, *optional*, defaults to `500`):
            steps between two checkpoints.
        resolution (`int`, *optional*):
            side of the images in pixels; the configuration's by default.
        semantic_weight (`float`, *optional*):
            of the semantic loss; the configuration's by default.
        perceptual_weight (`float`, *optional*):
            of the perceptual loss; the configuration's by default.
        caption_weight (`float`, *optional*, defaults to `0.0`):
            of the loss by which the codes of an image have to tell the words of its caption; 0 for none.
        augmentation (`Literal["white", "reflection", "none"]`, *optional*, defaults to `"white"`):
            what fills the corners of turned and shifted images: white suits drawings, reflection photos.
        do_pad (`bool`, *optional*, defaults to `False`):
            fit images into a white square, in place of cropping them to one.
        held_out_images (`int`, *optional*, defaults to `1024`):
            held-out images that are looked at, at most.
        bf16 (`Literal["auto", "on", "off"]`, *optional*, defaults to `"auto"`):
            bf16 in training; auto: where the device is faster by that.
    """

    config: str | dict[str, Any] | None = None
    steps: Count = 2400
    batch_size: Count = 48
    learning_rate: NotNegative = 1.5e-3
    warmup_steps: Annotated[Int, Field(ge=0)] = 100
    seed: Seed = 0
    save_every: Count = 500
    resolution: Count | None = None
    semantic_weight: NotNegative | None = None
    perceptual_weight: NotNegative | None = None
    caption_weight: NotNegative = 0.0
    augmentation: Literal["white", "reflection", "none"] = "white"
    do_pad: bool = False
    held_out_images: Count = 1024
    bf16: Annotated[Literal["auto", "on", "off"], OnOff] = "auto"


@dataclass(frozen=True, kw_only=True)
class AudioTokenizerSettings:
    """Fields of a recipe's section `audio_tokenizer`.

    Args:
        num_codes (`int`, *optional*, defaults to `1024`):
            number of different codes.
        sampling_rate (`int`, *optional*, defaults to `16000`):
            samples of one second; sounds are resampled.
        hop_length (`int`, *optional*, defaults to `200`):
            samples from one frame of the spectrogram to the next.
        win_length (`int`, *optional*, defaults to `640`):
            samples of a frame.
        num_mels (`int`, *optional*, defaults to `40`):
            bands of a frame.
        frames_per_code (`int`, *optional*, defaults to `3`):
            frames that a code stands for; with the defaults, 27 codes are a second.
        sounds (`int`, *optional*, defaults to `10000`):
            sounds that the codebook learns from, at most: the first of each source in turn, so shuffle sorted ones.
        held_out_sounds (`int`, *optional*, defaults to `500`):
            held-out sounds that are looked at, at most.
        seed (`int`, *optional*, defaults to `0`):
            of where the codebook begins.
    """

    num_codes: Count = 1024
    sampling_rate: Annotated[Int, Field(ge=1000, le=192_000)] = 16000
    hop_length: Count = 200
    win_length: Count = 640
    num_mels: Count = 40
    frames_per_code: Count = 3
    sounds: Count = 10_000
    held_out_sounds: Count = 500
    seed: Seed = 0


# fields of the configuration that have a flag
MODEL_SETTINGS = ("resolution", "semantic_weight", "perceptual_weight")


def read_config(settings: TokenizerSettings) -> "MomaVQConfig":
    """Return the model's configuration."""
    from transformers import PreTrainedConfig

    from tokenization.configuration_moma_vq import PRESETS, MomaVQConfig

    given, where, saved = settings.config or DEFAULT_PRESET, "config", set()
    if isinstance(given, str) and given not in PRESETS:
        where, given = f"config {given!r}", _read_config_file(given)
        # what the config.json of a saved model has beside
        saved = PreTrainedConfig().to_dict().keys() | {"model_type", "auto_map"}
    fields = {"preset": given} if isinstance(given, str) else dict(given)
    preset = fields.pop("preset", None)
    base = {} if preset is None else PRESETS.get(preset)
    if base is None:
        raise InputError(f"{where}: preset = {preset!r} is none of {sorted(PRESETS)}.")
    if (kind := fields.get("model_type", MomaVQConfig.model_type)) != MomaVQConfig.model_type:
        raise InputError(f"{where}: `model_type` is {kind!r}; an image tokenizer's is {MomaVQConfig.model_type!r}.")
    known = [*MomaVQConfig.__annotations__, *(saved & fields.keys())]
    refuse_unknown(fields, known, where, "MomaVQConfig")
    return MomaVQConfig(**{**base, **fields, **asked_fields(settings)})


def _read_config_file(place: str) -> dict[str, Any]:
    from tokenization.configuration_moma_vq import PRESETS

    if not Path(place).is_file():
        raise InputError(f"config {place!r} is neither one of {sorted(PRESETS)} nor a file.")
    try:
        fields = json.loads(Path(place).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"config {place!r}: it cannot be read as JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise InputError(f"config {place!r}: it holds a {type(fields).__name__}, not an object of fields.")
    return fields


def asked_fields(settings: TokenizerSettings) -> dict[str, Any]:
    """Return the fields of the configuration that the recipe's settings give."""
    return {name: getattr(settings, name) for name in MODEL_SETTINGS if getattr(settings, name) is not None}


def check_used(settings: TokenizerSettings, config: "MomaVQConfig"):
    """Look for settings that a new run would not read."""
    if settings.semantic_weight and config.semantic_dim is None:
        raise InputError(
            f"semantic_weight = {settings.semantic_weight}: `config` has no `semantic_dim`, so there is no semantic "
            "loss to weigh; give it `semantic_dim: 1280`, or leave the weight out."
        )
