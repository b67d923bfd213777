# SPDX-License-Identifier: Apache-2.0
"""Find the images of a folder that fit words best, by what a model would call them.

moma search icons/ cog "shopping cart" --model moma-icons

A file that is no image, or cannot be read, is told in a line; the others are ranked.
"""

import argparse
from dataclasses import asdict, dataclass
from typing import Annotated

from ..utils.fields import Count
from ..utils.messages import without_import_notices
from .arguments import Flag, parse_fields


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma search`.

    Args:
        folder (`str`):
            of images, with subfolders: those that Pillow reads, and SVG with the extra `icons`.
        queries (`list[str]`):
            words to look for; in quotes where one query has several.
        model (`str`):
            folder or Hub name of a model with its processor.
        output (`str`, *optional*):
            CSV or JSON file; by default lines are printed.
        top (`int`, *optional*, defaults to `10`):
            images of each query at most.
        name_prompt (`str`, *optional*):
            what the model's captions have before a name.
        tag_prompt (`str`, *optional*):
            what they have before tags; by default `tags:`.
        batch_size (`int`, *optional*, defaults to `32`):
            images at once.
    """

    folder: Annotated[str, Flag(metavar="FOLDER", is_positional=True)]
    queries: Annotated[list[str], Flag(metavar="WORDS", is_positional=True)]
    model: str
    output: str | None = None
    top: Count = 10
    name_prompt: str | None = None
    tag_prompt: str | None = None
    batch_size: Count = 32


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(args: Arguments) -> None:
    """Read, rank, and write the table or print it."""
    with without_import_notices():
        from ..labelling.folder import check_table, search_folder, shown, write_table
        from ..labelling.images import folder_files
        from ..labelling.labeler import check_queries, open_labeler

    if args.output is not None:
        check_table(args.output)
    # before the model is loaded
    folder_files(args.folder)
    check_queries(args.queries)
    labeler = open_labeler(args.model, args.name_prompt, args.tag_prompt, args.batch_size)
    found = search_folder(args.folder, args.queries, labeler, args.top, args.output)
    if args.output is not None:
        print(write_table(args.output, found, [asdict(entry) for entry in found]))
        return
    for entry in found:
        if entry.rank == 1 and len(args.queries) > 1:
            print(f"{entry.query}:")
        print(f"{entry.score:8.2f}  {shown(entry.file)}")


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
