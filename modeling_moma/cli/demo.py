# SPDX-License-Identifier: Apache-2.0
"""Open a page in the browser that captions, draws, answers, and shows the routing.

moma demo
moma demo DIR --port 8000 --examples PICTURES
"""

import argparse
import sys
from pathlib import Path


RELEASED = Path("model_cards/moma-emoji")
RELEASED_EXAMPLES = Path("model_cards/moma-emoji-space/examples")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", help=f"folder or Hub name of a model with its processor; in a checkout {RELEASED}"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; by default this one alone"
    )
    parser.add_argument("--port", type=int, default=7860, help="0 for any free one")
    parser.add_argument("--examples", help="folder of pictures to offer, and of words to draw in prompts.txt")
    args = parser.parse_args(arguments)
    if args.folder is None:
        if not RELEASED.is_dir():
            parser.error(f"FOLDER is needed: only a checkout has {RELEASED}")
        args.folder = str(RELEASED)
        args.examples = args.examples or (str(RELEASED_EXAMPLES) if RELEASED_EXAMPLES.is_dir() else None)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        from ..demo.page import build_page, open_page
    except ImportError as error:
        if error.name != "gradio":
            raise
        print("error: the page needs Gradio: pip install 'modeling-moma[demo]'", file=sys.stderr)
        return 2
    from ..demo.inputs import Examples
    from ..demo.studio import load_studio

    # examples are checked before the model, which takes longer to load
    examples = Examples.from_folder(args.examples) if args.examples else None
    page = build_page(load_studio(args.folder), examples)
    print(f"{args.folder}: {open_page(page, args.host, args.port)}", flush=True)
    page.block_thread()
    return 0
