# SPDX-License-Identifier: Apache-2.0
"""Name and tag the images of a folder, for alt text and for search.

moma label icons/ --model moma-icons --output labels.csv

A file that is no image, or cannot be read, is told in a line; the others are done.
"""

import argparse
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ..utils.fields import Count, Int
from ..utils.messages import without_import_notices
from .arguments import Flag, parse_fields


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma label`.

    Args:
        folder (`str`):
            of images, with subfolders: those that Pillow reads, and SVG with the extra `icons`.
        model (`str`):
            folder or Hub name of a model with its processor.
        output (`str`, *optional*):
            CSV or JSON file; by default lines are printed.
        names (`int`, *optional*, defaults to `5`):
            names of each image at most.
        tags (`int`, *optional*, defaults to `8`):
            tags of each image at most, 0 for none.
        name_prompt (`str`, *optional*):
            what the model's captions have before a name.
        tag_prompt (`str`, *optional*):
            what they have before tags; by default `tags:`.
        batch_size (`int`, *optional*, defaults to `32`):
            images at once.
    """

    folder: Annotated[str, Flag(metavar="FOLDER", is_positional=True)]
    model: str
    output: str | None = None
    names: Count = 5
    tags: Annotated[Int, Field(ge=0)] = 8
    name_prompt: str | None = None
    tag_prompt: str | None = None
    batch_size: Count = 32


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(args: Arguments) -> None:
    """Read, label, and write the table or print it."""
    with without_import_notices():
        from ..labelling.folder import check_table, label_folder, label_rows, shown, write_table
        from ..labelling.images import folder_files
        from ..labelling.labeler import open_labeler

    if args.output is not None:
        check_table(args.output)
    # before the model is loaded
    folder_files(args.folder)
    labeler = open_labeler(args.model, args.name_prompt, args.tag_prompt, args.batch_size)
    labels = label_folder(args.folder, labeler, args.names, args.tags, args.output)
    if args.output is not None:
        print(write_table(args.output, labels, label_rows(labels)))
        return
    for row in label_rows(labels):
        tags = f"; tags: {row['tags']}" if row["tags"] else ""
        # what a model writes may have line breaks, too
        print(shown(f"{row['file']}: {row['name']} ({row['probability']}){tags}"))


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
