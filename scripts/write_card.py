# SPDX-License-Identifier: Apache-2.0
"""Write a released model's card anew from the measurements in its folder."""

import argparse

from emoji_recipe.model_card import write_card


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder with evaluation.json, perhaps depth_comparison.json")
    write_card(parser.parse_args().model)


if __name__ == "__main__":
    main()
