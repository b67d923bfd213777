# SPDX-License-Identifier: Apache-2.0
"""Recipes: one YAML file that holds the fields of a model and of its training."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from ..configuration_moma import MomaConfig


# what a run decides and not a recipe
RUN_FIELDS = ("output_dir", "use_cpu", "resume_from_checkpoint")


@dataclass(frozen=True)
class Recipe:
    """
    What a training is made of.

    Args:
        model: fields of [`MomaConfig`]; the processor gives those of its token layout.
        trainer: fields of `TrainingArguments`.
    """

    model: dict[str, Any]
    trainer: dict[str, Any] = field(default_factory=dict)


def read_recipe(path: str | Path) -> Recipe:
    """
    Reads a recipe.

    Args:
        path: a YAML (or JSON) file with a mapping `model` and perhaps a mapping `trainer`.

    Returns:
        [`Recipe`]: its fields are known to `MomaConfig` and `TrainingArguments`, their values are not checked yet.

    Raises:
        ValueError: the file is missing or no such mapping, or has a section or field that nothing knows.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--recipe {str(path)!r} is no file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--recipe {str(path)!r} cannot be read as YAML: {error}") from error
    sections = ("model", "trainer")
    if not isinstance(content, dict) or "model" not in content or not content.keys() <= set(sections):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"--recipe {str(path)!r} must hold the sections `model` and perhaps `trainer`, got {found}: are the "
            "fields of the model not under `model:`?"
        )
    known = {
        "model": {entry.name for entry in dataclasses.fields(MomaConfig)},
        "trainer": {entry.name for entry in dataclasses.fields(TrainingArguments)} - set(RUN_FIELDS),
    }
    for section in sections:
        fields = content.get(section) or {}
        unknown = sorted(set(fields) - known[section]) if isinstance(fields, dict) else [str(fields)]
        if unknown:
            where = "MomaConfig" if section == "model" else "TrainingArguments that a recipe may set"
            raise ValueError(f"--recipe {str(path)!r}, {section}: {unknown[0]!r} is no field of {where}; misspelt?")
    return Recipe(content["model"] or {}, content.get("trainer") or {})
