# SPDX-License-Identifier: Apache-2.0
"""Train the picture tokenizer on a recipe's pictures; `--resume` goes on after a kill."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ..tools.import_notices import without_import_notices
from ..training.tokenizer_settings import DEFAULT_PRESET, PRESET_NAMES, SETTINGS, check_flags, check_settings


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="YAML file with a section `sources` and perhaps `image_tokenizer`, which holds defaults of the flags; or "
        "a folder, file or name on the Hub that `datasets` opens, with a column `image`",
    )
    parser.add_argument("--output", required=True, help="folder for the model, its checkpoint and metrics.json")
    parser.add_argument(
        "--config", help=f"one of {sorted(PRESET_NAMES)} or a JSON file; by default {DEFAULT_PRESET!r}"
    )
    for name, setting in SETTINGS.items():
        description = setting.description if setting.default is None else f"{setting.description}; %(default)s"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=setting.kind,
            default=setting.default,
            choices=setting.choices,
            help=description,
        )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument(
        "--strict", action="store_true", help="stop at a picture that cannot be used, in place of leaving it out"
    )
    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line over the recipe over the defaults; `sources` are those with pictures."""
    parser = make_parser()
    place = parser.parse_args(arguments).recipe
    with without_import_notices():
        from ..training.picture_sources import read_picture_sources

    sources, fields = read_picture_sources(place)
    parser.set_defaults(**check_settings(fields))
    args = parser.parse_args(arguments)
    check_flags(args)
    return argparse.Namespace(**vars(args), sources=sources)


def run(args: argparse.Namespace, on_step: Callable[[int, dict[str, float]], None] | None = None) -> list[dict]:
    with without_import_notices():
        from ..training.image_tokenizer import TokenizerTraining

    Path(args.output).mkdir(parents=True, exist_ok=True)
    return TokenizerTraining(args).run(on_step)


def main(
    arguments: list[str] | None = None, on_step: Callable[[int, dict[str, float]], None] | None = None
) -> list[dict]:
    return run(parse_arguments(arguments), on_step)
