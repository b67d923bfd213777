# SPDX-License-Identifier: Apache-2.0
"""Keep named images beside a model, after which `moma label` and `moma search` name new ones.

moma build-memory data/icons --model MODEL --name name --tags keywords --group family

It holds no images, but what the model makes of each, in some 35 bytes, and names and tags. It is used where it lies in
the folder of the model, which is the default. A row that cannot be read is told in a line; the others are kept.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..errors_moma import InputError
from ..utils.atomic_files import check_place
from ..utils.fields import Count, Int
from ..utils.messages import without_import_notices
from .arguments import Flag, parse_fields


OfMemory = Flag(section="memory")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma build-memory`.

    Args:
        data (`str`):
            folder, file or Hub name of a data set with images and their names; its split `train` is read, or the only
            one.
        model (`str`):
            folder or Hub name of a model with its processor.
        output (`str`, *optional*):
            file that is written, `.safetensors`; by default `memory/images.safetensors` in the folder of the model.
        image (`str`, *optional*, defaults to `"image"`):
            column of the image.
        name (`str`, *optional*, defaults to `"name"`):
            column of the name, written as in the captions that the model was trained on.
        tags (`str`, *optional*):
            column of the tags: lists, or texts with commas.
        group (`str`, *optional*):
            column of what draws one thing alike, such as the maker: of each name and group one image is kept.
        least_groups (`int`, *optional*, defaults to `1`):
            of names that fewer groups have no image is kept, but their tags are.
        most (`int`, *optional*, defaults to `24`):
            images of a name that are kept.
        dimensions (`int`, *optional*):
            numbers that are kept of an image, half a byte each; by default 64, or as an extended memory has.
        extend (`str`, *optional*):
            memory of the same model that the images are added to, such as the one in its folder.
        batch_size (`int`, *optional*, defaults to `64`):
            images at once.
    """

    data: Annotated[str, Flag(metavar="DATA", is_positional=True)]
    model: str
    output: str | None = None
    image: str = "image"
    name: str = "name"
    tags: str | None = None
    group: str | None = None
    least_groups: Count = 1
    most: Annotated[Count, OfMemory] = 24
    dimensions: Annotated[Annotated[Int, Field(ge=2, le=4096)] | None, OfMemory] = None
    extend: str | None = None
    batch_size: Annotated[Count, OfMemory] = 64


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(args: Arguments) -> None:
    """Read, keep, and write the memory."""
    with without_import_notices():
        from ..data.sources import Source
        from ..labelling.labeler import open_labeler
        from ..labelling.memory import MEMORY_FILE
        from ..labelling.reference_images import NamedImages, build_memory

    if args.output is None and not Path(args.model).is_dir():
        raise InputError(f"--output is needed: --model {args.model!r} is no folder that a memory could be written to.")
    if args.least_groups > 1 and args.group is None:
        raise InputError(f"--least-groups {args.least_groups}: name the column of the groups by --group.")
    if args.extend is not None and args.dimensions is not None:
        raise InputError(
            f"memory.dimensions = {args.dimensions}: a memory that is extended keeps its own; leave it out."
        )
    output = Path(args.output) if args.output is not None else Path(args.model) / MEMORY_FILE
    if output.suffix != ".safetensors":
        raise InputError(f"--output: {str(output)!r} does not end in .safetensors, which it is.")
    check_place(output)
    kind = NamedImages(image=args.image, label=args.name, tags=args.tags, group=args.group)
    labeler = open_labeler(args.model, batch_size=args.batch_size, memory_share=0.0)
    labeler.take_memory(args.extend, "--extend")
    memory = build_memory(
        Source("data", args.data, kind), labeler, args.least_groups, args.most, args.dimensions or 64, labeler.memory
    )
    path = memory.save(output)
    size = path.stat().st_size / 1e6
    print(f"{path}: {len(memory):,} images of {memory.num_image_names:,} names, {size:.2f} MB")


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
