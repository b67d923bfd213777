# SPDX-License-Identifier: Apache-2.0
"""Train the image tokenizer on a recipe's images; `--resume` goes on after a kill."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from ..training.tokenizer_settings import TokenizerSettings
from ..utils.atomic_files import check_writable
from ..utils.fields import read_fields
from ..utils.messages import without_import_notices
from .arguments import Changes, Flag, parse_fields


if TYPE_CHECKING:
    from ..data.sources import Source


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma train-image-tokenizer`.

    Args:
        recipe (`str`):
            YAML (or JSON) file with a section `sources` and perhaps `image_tokenizer`; or a folder, file or name on
            the Hub that `datasets` opens, with a column `image`.
        output (`str`):
            folder for the model, its checkpoint and metrics.json.
        set (`list[str]`, *optional*, defaults to `[]`):
            fields of the recipe, as image_tokenizer.steps=2400.
        resume (`bool`, *optional*, defaults to `False`):
            go on from the last checkpoint in the output folder.
        strict (`bool`, *optional*, defaults to `False`):
            stop at an image that cannot be used, in place of leaving it out.
    """

    recipe: Annotated[str, Flag(metavar="RECIPE", is_positional=True)]
    output: str
    set: Changes = field(default_factory=list)
    resume: bool = False
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class Run(Arguments, TokenizerSettings):
    """The flags, and what their recipe says.

    Args:
        sources (`list[Source]`):
            those with images.
    """

    sources: "list[Source]"


def parse_arguments(arguments: list[str] | None = None) -> Run:
    """Return the command line with what its recipe says."""
    given = parse_fields(Arguments, __doc__, arguments)
    with without_import_notices():
        from ..training.image_store import read_image_sources

    sources, fields = read_image_sources(given.recipe, given.set)
    settings = read_fields(TokenizerSettings, fields, "image_tokenizer", "this section")
    return Run(**vars(settings), **vars(given), sources=sources)


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
