# SPDX-License-Identifier: Apache-2.0
"""
Builds the emoji data set from npm packages: images of the same things by several designers, names and keywords.

    python scripts/build_emoji_dataset.py --output data/emoji

Needs `npm` (with network at the first run) and `rsvg-convert` (Debian: librsvg2-bin).
"""

import argparse
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from tqdm.auto import tqdm

from emoji_recipe.card import count_table, fill_card
from emoji_recipe.cells import SPLITS, drawing_cell, merge_cells, split_cells
from emoji_recipe.sources import PACKAGES, read_drawings, render, require_tools
from image_sets.npm import fetch_packages
from modeling_moma.utils.atomic_files import atomic_write


REPOSITORY = Path(__file__).resolve().parent.parent
FEATURES = Features(
    {
        "image": Image(),
        "style": Value("string"),
        "label": Value("string"),
        "keywords": List(Value("string")),
        "group": Value("string"),
        "subgroup": Value("string"),
    }
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "data" / "emoji", help="folder of the data set")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache" / "modeling-moma" / "emoji",
        help="folder that keeps the downloaded packages (about 190 MB)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the order of rows")
    parser.add_argument(
        "--skin-tones", action="store_true", help="add the skin-tone variants (about twice the images)"
    )
    parser.add_argument("--validation-share", type=float, default=0.035, help="share of images in validation")
    parser.add_argument("--test-share", type=float, default=0.05, help="share of images in test")
    parser.add_argument("--processes", type=int, default=2, help="rendering processes")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_tools()
    with tqdm(total=len(PACKAGES), desc="packages") as bar:
        fetch_packages(args.cache, PACKAGES, on_done=lambda name: bar.update())
    drawings = list(read_drawings(args.cache, skin_tones=args.skin_tones))
    with ProcessPoolExecutor(args.processes) as pool:
        images = list(tqdm(pool.map(render, drawings, chunksize=32), total=len(drawings), desc="rendering"))

    # the same image of the same style under the same label is one example
    unique = {(p.pixel_hash, d.style, d.emoji.label): (d, p) for d, p in zip(drawings, images, strict=True)}
    examples = [unique[key] for key in sorted(unique, key=lambda key: (key[1], key[2], key[0]))]
    cells = [drawing_cell(drawing.emoji.label, drawing.style) for drawing, _ in examples]
    hashes = [image.pixel_hash for _, image in examples]
    splits = split_cells(cells, hashes, {"validation": args.validation_share, "test": args.test_share}, seed=args.seed)
    random.Random(args.seed).shuffle(order := list(range(len(examples))))
    rows = {split: [to_row(*examples[i]) for i in order if splits[i] == split] for split in SPLITS}

    components = merge_cells(cells, hashes)
    largest = max(components, key=len)
    sample = sorted({cells[row] for row in largest})
    summary = f"{len(sample)} cells with {len(largest)} images, such as {sample[0][1]}: {sample[0][0]}"
    print(f"{len(drawings)} drawings, {len(drawings) - len(examples)} exact copies dropped")
    print(
        f"{len(set(cells))} cells in {len(components)} groups that stay together; cells of a group, number of groups:"
    )
    print(sorted(Counter(len({cells[row] for row in component}) for component in components).items()))
    print(f"largest: {summary}")

    sizes = {}
    for split in SPLITS:
        path = args.output / "data" / f"{split}-00000-of-00001.parquet"
        atomic_write(path, Dataset.from_list(rows[split], features=FEATURES).to_parquet)
        sizes[split] = path.stat().st_size
        print(f"{split}: {len(rows[split])} images, {sizes[split] / 1e6:.2f} MB")
    card = args.output / "README.md"
    template = card if card.exists() else REPOSITORY / "data" / "emoji" / "README.md"
    filled = fill_card(template.read_text(encoding="utf-8"), rows, sizes, summary)
    atomic_write(card, lambda path: path.write_text(filled, encoding="utf-8"))
    print(count_table(rows))


def to_row(drawing, image) -> dict:
    emoji = drawing.emoji
    return {
        "image": {"bytes": image.webp, "path": None},
        "style": drawing.style,
        "label": emoji.label,
        "keywords": list(emoji.keywords),
        "group": emoji.group,
        "subgroup": emoji.subgroup,
    }


if __name__ == "__main__":
    main()
