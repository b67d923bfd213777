# SPDX-License-Identifier: Apache-2.0
"""Write a released model's card anew from the measurements in its folder."""

import argparse
import json
from pathlib import Path

from emoji_recipe.model_card import EVALUATION_FILE, write_card
from icons_recipe.model_card import write_card as write_icons_card


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder with evaluation.json, perhaps depth_comparison.json")
    folder = Path(parser.parse_args().model)
    path = folder / EVALUATION_FILE
    is_of_icons = path.exists() and "evaluate_icons.py" in json.loads(path.read_text())["command"]
    (write_icons_card if is_of_icons else write_card)(folder)


if __name__ == "__main__":
    main()
