# SPDX-License-Identifier: Apache-2.0
"""
Builds a data set of images from npm packages: emoji by several designers, or icons of permissively licensed sets.

    python scripts/build_images.py emoji --output data/emoji
    python scripts/build_images.py icons --output data/icons

Needs `npm` (with network at the first run), for emoji `rsvg-convert` (Debian: librsvg2-bin), for icons
`pip install -e ".[icons]"`. What an earlier run has fetched, and of icons also rendered and compared, is found again
in `--cache`, so a run that was ended goes on where it was.
"""

import argparse
import json
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, List, Value
from tqdm.auto import tqdm

from cards import DATA, read_card, replace_block
from image_sets.cards import attribution, fill_emoji_card, icon_counts
from image_sets.emoji import Drawing, drawing_cell, read_drawings, read_emoji, render
from image_sets.groups import drop_and_group, read_held_out
from image_sets.icon_images import COLOURS, render_sets
from image_sets.icon_names import EMOJI_FAMILIES, HeldOutWords, held_out_slugs
from image_sets.icon_rows import SPLITS, read_rows, write_hash_list, write_splits
from image_sets.icon_sets import read_collections, read_set_files
from image_sets.packages import EMOJI_PACKAGES, ICON_PACKAGES, fetch_packages, require
from image_sets.splits import (
    EMOJI_SHARES,
    EMOJI_SPLITS,
    merge_cells,
    split_emoji,
    split_icons,
    thin_out,
    without_held_out,
)
from modeling_moma.utils.atomic_files import atomic_write


EMOJI_FEATURES = Features(
    {
        "image": Image(),
        "style": Value("string"),
        "label": Value("string"),
        "keywords": List(Value("string")),
        "group": Value("string"),
        "subgroup": Value("string"),
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=["emoji", "icons"])
    parser.add_argument("--output", type=Path, help="folder of the data set, by default that in data/")
    parser.add_argument(
        "--cache", type=Path, help="folder that keeps packages and rendered sets: 190 MB for emoji, 440 MB for icons"
    )
    parser.add_argument("--processes", type=int, default=2, help="rendering processes")
    parser.add_argument("--limit-sets", nargs="+", metavar="SET", help="of icons only these sets, as lucide tabler")
    args = parser.parse_args()
    output = args.output or DATA / args.set
    cache = args.cache or Path.home() / ".cache" / "modeling-moma" / args.set
    if args.set == "emoji":
        require("rsvg-convert", "librsvg2-bin")
        fetch_packages(cache, EMOJI_PACKAGES)
        build_emoji(output, cache, args.processes)
    else:
        torch.set_num_threads(args.processes)
        fetch_packages(cache, ICON_PACKAGES)
        build_icons(output, cache, args.processes, args.limit_sets)


def build_emoji(output: Path, cache: Path, processes: int) -> None:
    drawings = list(read_drawings(cache))
    with ProcessPoolExecutor(processes) as pool:
        images = list(tqdm(pool.map(render, drawings, chunksize=32), total=len(drawings), desc="rendering"))
    # the same image of the same style under the same label is one example
    unique = {
        (drawing.style, drawing.emoji.label, image[1]): (drawing, *image) for drawing, image in zip(drawings, images)
    }
    examples = [unique[key] for key in sorted(unique)]
    cells = [drawing_cell(drawing.emoji.label, drawing.style) for drawing, *_ in examples]
    hashes = [pixel_hash for *_, pixel_hash in examples]
    of_row = split_emoji(cells, hashes, EMOJI_SHARES)
    random.Random(0).shuffle(order := list(range(len(examples))))
    rows = {split: [emoji_row(*examples[i][:2]) for i in order if of_row[i] == split] for split in EMOJI_SPLITS}
    sizes = {}
    for split in EMOJI_SPLITS:
        path = output / "data" / f"{split}-00000-of-00001.parquet"
        atomic_write(path, Dataset.from_list(rows[split], features=EMOJI_FEATURES).to_parquet)
        sizes[split] = path.stat().st_size
    group = max(merge_cells(cells, hashes), key=len)
    merged = sorted({cells[row] for row in group})
    largest = f"{len(merged)} cells with {len(group)} images, such as {merged[0][1]}: {merged[0][0]}"
    write_text(output / "README.md", fill_emoji_card(read_card(output, "emoji"), rows, sizes, largest))


def emoji_row(drawing: Drawing, webp: bytes) -> dict:
    _, label, keywords, group, subgroup, _ = drawing.emoji
    image = {"bytes": webp, "path": None}
    texts = {"style": drawing.style, "label": label, "keywords": list(keywords)}
    return {"image": image, **texts, "group": group, "subgroup": subgroup}


def build_icons(output: Path, cache: Path, processes: int, limit_sets: list[str] | None) -> None:
    collections, brands = read_collections(cache)
    if limit_sets:
        collections = {prefix: collections[prefix] for prefix in collections if prefix in limit_sets}
    render_sets(cache, collections, processes)
    emoji, held_out_emoji = read_emoji(cache), read_held_out(DATA / "emoji")
    rows = list(read_rows(cache, collections, emoji))
    slugs = {
        prefix: held_out_slugs(
            json.loads(document), [row.icon for row in rows if row.set == prefix], emoji, held_out_emoji.cells
        )
        for prefix, document in read_set_files(cache, EMOJI_FAMILIES.keys() & collections.keys())
    }
    grouped = drop_and_group(rows, slugs, held_out_emoji, cache)
    seen_texts = {*COLOURS, *held_out_emoji.train_texts, *(row.full_style for row in grouped.rows)}
    seen_texts |= {category for row in grouped.rows for category in row.categories}
    families, names = [row.family for row in grouped.rows], [row.name for row in grouped.rows]
    splits = split_icons(families, names, grouped.groups, grouped.stays.tolist(), sorted(seen_texts), brands)
    of_row, thinned = thin_out(grouped.rows, splits.of_row)
    dropped = grouped.dropped + thinned
    dropped["of a family that never trains, near-identical to another family's"] = splits.of_row.count(None)

    words = HeldOutWords([*splits.words, *splits.pairs])
    by_split = {split: [] for split in SPLITS}
    for row, split in zip(grouped.rows, of_row, strict=True):
        if split is not None:
            by_split[split].append(without_held_out(row, words) if split == "train" else row)
    sizes = write_splits(output / "data", by_split)
    write_hash_list(output / "hashes.parquet", grouped.rows, of_row, grouped.groups.tolist())
    phrases = {"words": splits.words, "pairs": splits.pairs}
    write_text(output / "held_out.json", json.dumps(phrases, indent=1) + "\n")
    images = Counter(row.set for split in SPLITS for row in by_split[split])
    write_text(output / "LICENSES" / "ATTRIBUTION.md", attribution(collections, images))
    summary = {
        "Families": len(set(families)),
        "Near-identical pairs": len(grouped.pairs),
        "Groups of merged cells": len(set(grouped.groups.tolist())),
        "Words held out": len(splits.words),
        "Pairs of words held out": len(splits.pairs),
    }
    counts = icon_counts(by_split, sizes, dropped, summary)
    write_text(output / "README.md", replace_block(read_card(output, "icons"), counts))


def write_text(path: Path, text: str) -> None:
    atomic_write(path, lambda aside: aside.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
