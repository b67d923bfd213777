# SPDX-License-Identifier: Apache-2.0
"""Write a released model's card anew from the measurements in its folder."""

import argparse
import sys
from pathlib import Path

from emoji_recipe.model_card import EVALUATION_FILE, write_card
from icons_recipe.model_card import write_card as write_icons_card
from modeling_moma.hub.folder import read_json


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder with evaluation.json, perhaps depth_comparison.json")
    folder = Path(parser.parse_args(arguments).model)
    path = folder / EVALUATION_FILE
    try:
        is_of_icons = path.exists() and "evaluate_icons.py" in read_json(path)["command"]
        (write_icons_card if is_of_icons else write_card)(folder)
    except KeyError as error:
        print(f"error: --model: {str(path)!r} lacks {error}: of another script, or edited by hand?", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: --model {str(folder)!r}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
