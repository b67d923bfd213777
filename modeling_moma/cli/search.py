# SPDX-License-Identifier: Apache-2.0
"""Find the images of a folder that fit words best, by their looks and their file names.

moma search icons/ cog "shopping cart" --model MODEL

A file that is no image, or cannot be read, is told in a line; the others are ranked.
"""

import argparse
from dataclasses import asdict, dataclass
from typing import Annotated

from ..labelling import FILE_NAME_SHARE
from ..utils.fields import Count, Share
from ..utils.messages import without_import_notices
from .arguments import Flag, parse_fields
from .label import FolderArguments, checked_labeler


@dataclass(frozen=True, kw_only=True)
class Arguments(FolderArguments):
    """Flags of `moma search`.

    Args:
        queries (`list[str]`):
            words to look for; in quotes where one query has several.
        top (`int`, *optional*, defaults to `10`):
            images of each query at most.
        file_name_share (`float`, *optional*, defaults to `0.5`):
            what words in names of files count for, and tags that the memory has of such names; 0 for images alone.
    """

    queries: Annotated[list[str], Flag(metavar="WORDS", is_positional=True)]
    top: Count = 10
    file_name_share: Share = FILE_NAME_SHARE


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(args: Arguments) -> None:
    """Read, rank, and write the table or print it."""
    with without_import_notices():
        from ..labelling.folder import search_folder, shown, write_table
        from ..labelling.labeler import check_queries

    check_queries(args.queries)
    labeler = checked_labeler(args)
    found = search_folder(args.folder, args.queries, labeler, args.top, args.output, args.file_name_share)
    if args.output is not None:
        print(write_table(args.output, found, [asdict(entry) for entry in found]))
        return
    for entry in found:
        if entry.rank == 1 and len(args.queries) > 1:
            print(f"{shown(entry.query)}:")
        print(f"{entry.score:8.2f}  {shown(entry.file)}")


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
