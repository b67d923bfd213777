# SPDX-License-Identifier: Apache-2.0
"""Put a Hugging Face Space together: its files, the packages, and the model.

python scripts/make_space.py --output runs/space
"""

import argparse
import shutil
import sys
from pathlib import Path

from modeling_moma.hub.loading import PROCESSOR, check_saved
from modeling_moma.utils.atomic_files import write_folder_aside


ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "model_cards" / "moma-icons-space"
MODEL = ROOT / "model_cards" / "moma-icons"
PACKAGES = ("modeling_moma", "tokenization")
# of the model's folder: what it takes to run it
MODEL_FILES = (
    "*.json",
    "*.jinja",
    "*.safetensors",
    "vq_model/*",
    "memory/*",
    "*_codec/*",
    "additional_chat_templates/*",
)


def make_space(output: Path, model: Path = MODEL) -> Path:
    """Writes a new folder that can be pushed as a Space, of a model with its processor."""
    if output.exists():
        raise ValueError(f"--output: {str(output)!r} exists already; name a new folder.")
    if not (model / "model.safetensors").is_file():
        raise ValueError(f"--model: {str(model)!r} holds no model.safetensors.")
    check_saved(PROCESSOR, "--model", str(model))

    def write(folder: Path):
        unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(SPACE, folder, ignore=unwanted)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package, ignore=unwanted)
        for path in (path for pattern in MODEL_FILES for path in model.glob(pattern)):
            target = folder / MODEL.name / path.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    return write_folder_aside(output, write)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--model",
        type=Path,
        default=MODEL,
        help="folder of the model; by default moma-icons, which README, examples and the form of captions are of",
    )
    args = parser.parse_args(arguments)
    try:
        print(make_space(args.output, args.model))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
