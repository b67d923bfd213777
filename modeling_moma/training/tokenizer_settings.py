# SPDX-License-Identifier: Apache-2.0
"""Settings of a picture tokenizer's training: flags, fields of a recipe, and what a resumed run must repeat."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenization.configuration_moma_vq import PRESETS, MomaVQConfig

from ..errors_moma import InputError


DEFAULT_PRESET = "small"


@dataclass(frozen=True)
class Setting:
    """
    A flag, and a field of a recipe's section `image_tokenizer`.

    Args:
        kind: of its value.
        default: where neither flag nor recipe gives one.
        description: of the flag.
        smallest: value that is allowed.
        choices: values that are allowed.
    """

    kind: type
    default: Any
    description: str
    smallest: float | None = None
    choices: tuple[str, ...] | None = None


SETTINGS = {
    "steps": Setting(int, 2400, "steps of the optimizer", smallest=1),
    "batch_size": Setting(int, 48, "pictures of a step", smallest=1),
    "learning_rate": Setting(float, 1.5e-3, "largest one of the schedule", smallest=0),
    "warmup_steps": Setting(int, 100, "steps in which the learning rate rises", smallest=0),
    "seed": Setting(int, 0, "of weights, order and augmentation"),
    "save_every": Setting(int, 500, "steps between two checkpoints", smallest=1),
    "resolution": Setting(int, None, "side of the pictures in pixels; the configuration's by default", smallest=1),
    "semantic_weight": Setting(float, None, "the configuration's by default", smallest=0),
    "perceptual_weight": Setting(float, None, "the configuration's by default", smallest=0),
    "adversarial_weight": Setting(float, 0.0, "of the patch discriminator's term; 0: no discriminator", smallest=0),
    "adversarial_start": Setting(int, 0, "steps without the discriminator, at the beginning", smallest=0),
    "augmentation": Setting(
        str,
        "white",
        "what fills the corners of turned and shifted pictures: white suits drawings, reflection photos",
        choices=("white", "reflection", "none"),
    ),
    "held_out_pictures": Setting(int, 1024, "held-out pictures that are looked at, at most", smallest=1),
    "bf16": Setting(str, "auto", "bf16 in training; auto: where the device has it", choices=("auto", "on", "off")),
}
# fields of the configuration that have a flag
MODEL_SETTINGS = ("resolution", "semantic_weight", "perceptual_weight")
# arguments without which a run would end elsewhere; the model's own are in its configuration
DECISIVE = (
    *("steps", "batch_size", "learning_rate", "warmup_steps", "seed"),
    *("adversarial_weight", "adversarial_start", "augmentation"),
)
# what checkpoints of earlier versions were begun with and do not say
ONCE = {"adversarial_weight": 0.0, "augmentation": "white"}


def check_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """
    Checks the section `image_tokenizer` of a recipe.

    Args:
        fields: those of [`SETTINGS`] and `config`: a preset's name, a JSON file, or a mapping of fields of
            [`MomaVQConfig`] and perhaps `preset`, the one that they change.

    Returns:
        The fields, their values of the right kind.

    Raises:
        ValueError: names the field that is unknown or has an impossible value.
    """
    where, checked = "image_tokenizer", {}
    for name, value in fields.items():
        if name == "config":
            if not isinstance(value, (str, dict)):
                raise InputError(f"{where}: config = {value!r} is neither a name, a file nor a mapping of fields.")
            checked[name] = value
        elif name not in SETTINGS:
            raise InputError(f"{where}: {name!r} is no setting; it takes {sorted(['config', *SETTINGS])}.")
        else:
            checked[name] = _checked(f"{where}: {name}", SETTINGS[name], value)
    return checked


def check_flags(args: argparse.Namespace) -> None:
    """Refuses numbers out of range, as [`check_settings`] does."""
    for name, setting in SETTINGS.items():
        value = getattr(args, name)
        if value is not None:
            _checked(f"--{name.replace('_', '-')}", setting, value)


def _checked(where: str, setting: Setting, value: Any) -> Any:
    if isinstance(value, bool) and setting.choices is not None:
        # YAML reads `on` and `off` as truth
        value = "on" if value else "off"
    try:
        # YAML reads 1e-3 as text
        result = setting.kind(value)
        is_fine = not isinstance(value, bool) and (setting.kind is not int or result == float(value))
    except (TypeError, ValueError):
        is_fine, result = False, value
    if not is_fine:
        raise InputError(f"{where} = {value!r} must be of type {setting.kind.__name__}.")
    if setting.smallest is not None and result < setting.smallest:
        raise InputError(f"{where} = {value!r} must be at least {setting.smallest}.")
    if setting.choices is not None and result not in setting.choices:
        raise InputError(f"{where} = {value!r} is none of {list(setting.choices)}.")
    return result


def read_config(args: argparse.Namespace) -> MomaVQConfig:
    """
    The model's configuration.

    Args:
        args: `config` and [`MODEL_SETTINGS`].

    Raises:
        ValueError: `config` is neither a preset, a file nor a mapping of known fields, or its values fit no model.
    """
    asked = asked_fields(args)
    given = args.config or DEFAULT_PRESET
    if isinstance(given, dict):
        fields = dict(given)
        preset = fields.pop("preset", None)
        base = {} if preset is None else PRESETS.get(preset)
        if base is None:
            raise InputError(f"config: preset = {preset!r} is none of {sorted(PRESETS)}.")
        fields = {**base, **fields}
    elif given in PRESETS:
        fields = PRESETS[given]
    elif Path(given).is_file():
        fields = json.loads(Path(given).read_text())
    else:
        raise InputError(f"--config {given!r} is neither one of {sorted(PRESETS)} nor a file.")
    known = set(MomaVQConfig.__annotations__)
    unknown = sorted(set(fields) - known) if isinstance(given, dict) else []
    if unknown:
        raise InputError(f"config: {unknown[0]!r} is no field of MomaVQConfig; it has {sorted(known)}.")
    return MomaVQConfig(**{**fields, **asked})


def asked_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the configuration that flags or the recipe's settings give."""
    return {name: getattr(args, name) for name in MODEL_SETTINGS if getattr(args, name) is not None}


def check_resumed(args: argparse.Namespace, config: MomaVQConfig, begun: Mapping[str, Any]):
    """Compare the command line with what a checkpoint was begun with; what it leaves out is the checkpoint's.

    Args:
        args: of the run that goes on.
        config: of the checkpoint.
        begun: the arguments that its run was begun with.

    Raises:
        ValueError: they differ, so the run would not end as it would have.
    """
    asked = asked_fields(args)
    if args.config:
        now = read_config(args)
        asked |= {name: getattr(now, name) for name in MomaVQConfig.__annotations__}
    pairs: dict[str, tuple[Any, Any]] = {name: (getattr(config, name), value) for name, value in asked.items()}
    begun = {**ONCE, **begun}
    pairs |= {f"--{name.replace('_', '-')}": (value, getattr(args, name)) for name, value in begun.items()}
    for name, (then, now) in pairs.items():
        # JSON knows no tuples
        is_same = list(then) == list(now) if isinstance(then, (list, tuple)) and now is not None else then == now
        if not is_same:
            raise InputError(
                f"--resume: the run in `--output` {args.output!r} was begun with {name} = {then!r}, and this command "
                f"asks for {now!r}. Resume with the arguments of the first start, or give a new `--output`."
            )


def check_same_pictures(output: str, now: Mapping[str, Any], begun: Mapping[str, Any] | None):
    """
    Compare the pictures with those that a checkpoint was trained on.

    Args:
        output: folder of the run.
        now: facts about its pictures, by name.
        begun: what they were at the first start, or `None` in checkpoints of earlier versions.

    Raises:
        ValueError: they are others.
    """
    for name, fact in now.items():
        then = fact if begun is None else begun[name]
        if fact != then:
            raise InputError(
                f"--resume: the run in `--output` {output!r} was begun with {name} = {then!r}, and now it is "
                f"{fact!r}. Resume with the data of the first start, or give a new `--output`."
            )
