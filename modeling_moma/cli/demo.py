# SPDX-License-Identifier: Apache-2.0
"""Open a page in the browser that captions, names, draws, answers, and shows the routing.

moma demo
moma demo DIR --port 8000 --examples IMAGES --search ICONS
"""

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..utils.errors import needs_extra
from ..utils.fields import Int
from ..utils.messages import without_import_notices
from .arguments import Flag, FlagParser
from .label import OfLabeler


RELEASED = Path("model_cards/moma-icons")
RELEASED_EXAMPLES = Path("model_cards/moma-icons-space/examples")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma demo`.

    Args:
        folder (`str`, *optional*):
            folder or Hub name of a model with its processor; in a checkout model_cards/moma-icons, with examples to
            search.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            0.0.0.0 lets other machines in; by default this one alone.
        port (`int`, *optional*, defaults to `7860`):
            0 for any free one.
        examples (`str`, *optional*):
            folder of images to offer, and of words to draw in prompts.txt.
        search (`str`, *optional*):
            folder of images that visitors may search by words.
        name_prompt (`str`, *optional*, defaults to `""`):
            what the model's captions have before a name.
        tag_prompt (`str`, *optional*, defaults to `"tags:"`):
            what they have before tags.
    """

    folder: Annotated[str, Flag(metavar="FOLDER", is_positional=True)] = ""
    host: str = "127.0.0.1"
    port: Annotated[Int, Field(ge=0, le=65535)] = 7860
    examples: str | None = None
    search: str | None = None
    name_prompt: Annotated[str, OfLabeler] = ""
    tag_prompt: Annotated[str, OfLabeler] = "tags:"


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    parser = FlagParser(Arguments, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.read(arguments)
    if given.get("folder") is None:
        if not RELEASED.is_dir():
            parser.error(f"FOLDER is needed: only a checkout has {RELEASED}")
        given["folder"] = str(RELEASED)
        if RELEASED_EXAMPLES.is_dir():
            given = {"examples": str(RELEASED_EXAMPLES), "search": str(RELEASED_EXAMPLES), **given}
    return Arguments(**given)


def run(args: Arguments) -> int:
    with needs_extra("the page needs Gradio", "demo"), without_import_notices():
        importlib.import_module("gradio")
    from ..demo.page import Examples, build_page, open_page
    from ..demo.studio import load_studio
    from ..labelling.images import folder_files
    from ..labelling.labeler import CaptionForm

    # examples are checked before the model, which takes longer to load
    examples = Examples.from_folder(args.examples) if args.examples else None
    if args.search is not None:
        folder_files(args.search, option="--search")
    form = CaptionForm(name_prompt=args.name_prompt, tag_prompt=args.tag_prompt)
    page = build_page(load_studio(args.folder, form, args.search), examples)
    print(f"{args.folder}: {open_page(page, args.host, args.port)}", flush=True)
    page.block_thread()
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run(parse_arguments(arguments))
