# SPDX-License-Identifier: Apache-2.0
"""Image tokenizer, processor and tokens of the study, made by the commands of the package."""

import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import yaml

from modeling_moma.utils.atomic_files import atomic_write

from .grid import TWELFTHS
from .training import Study


# of the icons, what the runs read twelve times as often
TWELFTH = "train[:22559]"


def prepare(study: Study, work: Path, selections: Collection[str]) -> None:
    """Make what runs read; what is there already is kept.

    Args:
        study ([`Study`]):
            see there.
        work (`Path`):
            folder of everything that is made.
        selections (`Collection[str]`):
            of the data, those of the runs.
    """
    tokenizer = work / "tokenizer"
    is_own_asked = any(study.processor_of(data) == study.processor for data in selections)
    if is_own_asked and not (study.processor / "processor_config.json").is_file():
        if not (tokenizer / "config.json").is_file():
            moma("train-image-tokenizer", study.recipe, "--output", tokenizer, "--resume")
        moma("build-processor", study.recipe, "--image-tokenizer", tokenizer, "--output", study.processor)
    for data in sorted(selections):
        recipe = study.recipe
        if data in TWELFTHS:
            recipe = work / "twelfth.yaml"
            atomic_write(recipe, lambda path: path.write_text(twelfth_recipe(study.recipe)))
        moma("tokenize", recipe, "--processor", study.processor_of(data), "--output", study.tokens / data)


def moma(command: str, *arguments: str | Path) -> None:
    """Run a command of the package."""
    subprocess.run([sys.executable, "-m", "modeling_moma", command, *map(str, arguments)], check=True)


def twelfth_recipe(recipe: Path) -> str:
    """Return the recipe with a twelfth of the icons to train on, as YAML."""
    content = yaml.safe_load(recipe.read_text())
    content["sources"]["icons"]["splits"] = {**content["sources"]["icons"].get("splits", {}), "train": TWELFTH}
    return yaml.safe_dump(content, sort_keys=False)
