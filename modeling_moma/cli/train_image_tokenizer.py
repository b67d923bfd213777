# SPDX-License-Identifier: Apache-2.0
"""Train the image tokenizer on a recipe's images; `--resume` goes on after a kill."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ..training.tokenizer_settings import TokenizerSettings
from ..utils.atomic_files import check_writable
from ..utils.fields import read_fields
from ..utils.messages import without_import_notices
from .arguments import Flag, FlagParser


if TYPE_CHECKING:
    from ..data.sources import Source


@dataclass(frozen=True, kw_only=True)
class Arguments(TokenizerSettings):
    """Flags of `moma train-image-tokenizer`.

    Args:
        recipe (`str`):
            YAML (or JSON) file with a section `sources` and perhaps `image_tokenizer`, which holds defaults of the
            flags; or a folder, file or name on the Hub that `datasets` opens, with a column `image`.
        output (`str`):
            folder for the model, its checkpoint and metrics.json.
        resume (`bool`, *optional*, defaults to `False`):
            go on from the last checkpoint in the output folder.
        strict (`bool`, *optional*, defaults to `False`):
            stop at an image that cannot be used, in place of leaving it out.
    """

    recipe: Annotated[str, Flag(metavar="RECIPE", is_positional=True)]
    output: str
    resume: bool = False
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class Run(Arguments):
    """The flags, and what their recipe says.

    Args:
        sources (`list[Source]`):
            those with images.
    """

    sources: "list[Source]"


def parse_arguments(arguments: list[str] | None = None) -> Run:
    """Return the command line over the recipe over the defaults."""
    given = FlagParser(Arguments, description=__doc__).read(arguments)
    with without_import_notices():
        from ..training.image_sources import read_image_sources

    sources, fields = read_image_sources(given["recipe"])
    settings = vars(read_fields(TokenizerSettings, fields, "image_tokenizer", "this section"))
    of_recipe = {name: settings[name] for name in fields}
    return Run(**{**of_recipe, **given}, sources=sources)


def run(args: Run, on_step: Callable[[int, dict[str, float]], None] | None = None) -> list[dict]:
    with without_import_notices():
        from ..data.sources import refuse_output_in_data
        from ..training.image_tokenizer import TokenizerTraining
        from ..training.output_lock import sole_run

    refuse_output_in_data(args.output, args.sources)
    check_writable(args.output)
    with sole_run(args.output):
        return TokenizerTraining(args, args.sources, args.output, args.resume, args.strict).run(on_step)


def main(
    arguments: list[str] | None = None, on_step: Callable[[int, dict[str, float]], None] | None = None
) -> list[dict]:
    return run(parse_arguments(arguments), on_step)
