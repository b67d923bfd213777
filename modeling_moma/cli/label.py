# SPDX-License-Identifier: Apache-2.0
"""Name and tag the images of a folder, for alt text and for search.

moma label icons/ --model MODEL --output labels.csv

A file that is no image, or cannot be read, is told in a line; the others are done.
"""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..errors_moma import InputError
from ..labelling import MOST_GUESSES, MOST_VIEWS
from ..utils.fields import Count, Float, Int
from ..utils.messages import without_import_notices
from .arguments import Flag, parse_fields


if TYPE_CHECKING:
    from ..labelling.labeler import ImageLabeler


OfLabeler = Flag(section="labeler")


@dataclass(frozen=True, kw_only=True)
class FolderArguments:
    """Flags of commands that read a folder of images.

    Args:
        folder (`str`):
            of images, with subfolders: those that Pillow reads, and SVG with the extra `icons`.
        model (`str`):
            folder or Hub name of a model with its processor.
        output (`str`, *optional*):
            CSV or JSON file; by default lines are printed.
        name_prompt (`str`, *optional*, defaults to `""`):
            what the model's captions have before a name.
        tag_prompt (`str`, *optional*, defaults to `"tags:"`):
            what they have before tags.
        batch_size (`int`, *optional*, defaults to `32`):
            images at once.
        views (`int`, *optional*, defaults to `1`):
            codings of each image, up to 9, moved by a pixel or so, over which probabilities are averaged; each takes
            as much time.
        memory (`str`, *optional*):
            file of `moma build-memory`; by default the one in the folder of the model, where there is one.
        memory_share (`float`, *optional*, defaults to `0.5`):
            what it counts for beside the model, 0 for none.
    """

    folder: Annotated[str, Flag(metavar="FOLDER", is_positional=True)]
    model: str
    output: str | None = None
    name_prompt: Annotated[str, OfLabeler] = ""
    tag_prompt: Annotated[str, OfLabeler] = "tags:"
    batch_size: Annotated[Count, OfLabeler] = 32
    views: Annotated[Count, Field(le=MOST_VIEWS)] = 1
    memory: str | None = None
    memory_share: Annotated[Float, Field(ge=0, le=1)] = 0.5


@dataclass(frozen=True, kw_only=True)
class Arguments(FolderArguments):
    """Flags of `moma label`.

    Args:
        names (`int`, *optional*, defaults to `5`):
            names of each image at most, up to 100.
        tags (`int`, *optional*, defaults to `8`):
            tags of each image at most, up to 100, 0 for none.
    """

    names: Annotated[Count, Field(le=MOST_GUESSES)] = 5
    tags: Annotated[Int, Field(ge=0, le=MOST_GUESSES)] = 8


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments, formatter_class=argparse.RawDescriptionHelpFormatter)


def checked_labeler(args: FolderArguments) -> "ImageLabeler":
    """Return the labeler, once it is known that there are files to read and that a table can be written."""
    from ..labelling.folder import check_table
    from ..labelling.images import folder_files
    from ..labelling.labeler import CaptionForm, open_labeler

    if args.memory is not None and args.memory_share == 0:
        raise InputError(f"--memory {args.memory!r}: with --memory-share 0 it is not read; leave one out.")
    if args.output is not None:
        check_table(args.output)
    folder_files(args.folder)
    form = CaptionForm(name_prompt=args.name_prompt, tag_prompt=args.tag_prompt)
    return open_labeler(args.model, form, args.batch_size, args.views, args.memory, args.memory_share)


def run(args: Arguments) -> None:
    """Read, label, and write the table or print it."""
    with without_import_notices():
        from ..labelling.folder import label_folder, label_rows, shown, write_table

    labeler = checked_labeler(args)
    labels = label_folder(args.folder, labeler, args.names, args.tags, args.output)
    if args.output is not None:
        print(write_table(args.output, labels, label_rows(labels)))
        return
    for row in label_rows(labels):
        tags = f"; tags: {row['tags']}" if row["tags"] else ""
        name = f"{row['name']} ({row['probability']})" if row["probability"] else "no name found"
        # what a model writes may have line breaks, too
        print(shown(f"{row['file']}: {name}{tags}"))


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
