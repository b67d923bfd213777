# SPDX-License-Identifier: Apache-2.0
"""
Measures a model's names of icons of sets that data/icons leaves out for their licences, and writes them on its card.

    python scripts/evaluate_unseen_icons.py --model model_cards/moma-icons

Unlike icons of `test`, these need not have a name that another maker's icon has in the training.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from cards import replace_block
from icon_evaluation.card import percent
from icon_evaluation.measures import NAMES, name_figures
from icon_evaluation.samples import order
from image_sets.icon_images import render_icon
from image_sets.icon_names import read_names
from image_sets.icon_sets import read_set_files
from image_sets.packages import ICONIFY, fetch_packages
from modeling_moma.labelling.labeler import open_labeler
from modeling_moma.utils.atomic_files import atomic_write
from modeling_moma.utils.messages import markdown_table


SETS = ("circum", "dashicons", "entypo", "gridicons", "icomoon-free", "typcn", "whh")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model with its card")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "modeling-moma" / "icons")
    parser.add_argument("--limit", type=int, default=1000, help="icons, chosen by a hash of set and file name")
    args = parser.parse_args()
    fetch_packages(args.cache, [ICONIFY])
    icons = []
    for prefix, document in read_set_files(args.cache, SETS):
        icon_set = json.loads(document)
        names = read_names(icon_set, icon_set["icons"])
        icons += [(prefix, slug, names[slug].name, icon_set) for slug in icon_set["icons"]]
    number = len(icons)
    icons = sorted(icons, key=lambda icon: order(*icon[:2]))[: args.limit]
    labeler = open_labeler(str(args.model))
    codes = labeler.encode([Image.fromarray(render_icon(full, full["icons"][slug])) for _, slug, _, full in icons])
    found = {
        "MoMa": labeler.beam_names(codes, NAMES),
        "MoMa and memory": labeler.names(codes, NAMES),
    }
    known = set(labeler.memory.names) if labeler.memory else set()
    places = {
        "all": range(len(icons)),
        "names in the memory": [place for place, (_, _, name, _) in enumerate(icons) if name in known],
    }
    rows = []
    for of_which, chosen in places.items():
        for whose, guesses in found.items():
            texts = [[guess.text for guess in guesses[place]] for place in chosen]
            figures = name_figures(texts, [{"name": icons[place][2]} for place in chosen])
            rows.append([f"{of_which} ({len(chosen)}), {whose}", *map(percent, figures.values())])
    table = markdown_table(["names of unseen sets", "top-1", "top-5", "a word in common"], rows)
    text = f"{len(icons):,} of {number:,} icons of {', '.join(SETS)}:\n\n{table}"
    card = args.model / "README.md"
    filled = replace_block(card.read_text(), text, "unseen")
    atomic_write(card, lambda path: path.write_text(filled))
    print(text)


if __name__ == "__main__":
    main()
