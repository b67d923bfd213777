# SPDX-License-Identifier: Apache-2.0
"""
Builds the icon data set from npm packages: the permissively licensed sets of Iconify, rendered, named and split.

    python scripts/build_icons_dataset.py --output data/icons

Needs `npm` (with network at the first run) and `pip install -e ".[icons]"`. What an earlier run has fetched, rendered
and compared is found again in `--cache`, so a run that was ended goes on where it was.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm.auto import tqdm

from emoji_recipe.sources import read_emoji
from icons_recipe.card import attribution, count_table, fill_card
from icons_recipe.drawing import COLOURS
from icons_recipe.emoji import EMOJI_FAMILIES, held_out_slugs, read_held_out
from icons_recipe.files import HASH_LIST, write_hash_list, write_splits
from icons_recipe.grouping import drop_and_group
from icons_recipe.held_out import thin_out, without_held_out
from icons_recipe.rendering import render_sets
from icons_recipe.rows import read_rows
from icons_recipe.sets import PACKAGES, fetch_archives, read_brand_names, read_collections, read_set_files
from icons_recipe.splits import SPLITS, split_rows
from icons_recipe.tags import pool_tags, read_tags
from icons_recipe.words import HeldOutWords
from image_sets.npm import require_npm
from modeling_moma.utils.atomic_files import atomic_write


REPOSITORY = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "data" / "icons", help="folder of the data set")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache" / "modeling-moma" / "icons",
        help="folder that keeps the downloaded packages (about 140 MB) and the rendered sets (about 300 MB)",
    )
    parser.add_argument(
        "--emoji", type=Path, default=REPOSITORY / "data" / "emoji", help="emoji set whose held-out part stays out"
    )
    parser.add_argument("--limit-sets", nargs="+", metavar="SET", help="take only these sets, such as lucide tabler")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the order of rows")
    parser.add_argument("--processes", type=int, default=2, help="rendering processes")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    started = time.monotonic()
    require_npm()
    torch.set_num_threads(args.processes)
    with tqdm(total=len(PACKAGES), desc="packages") as bar:
        fetch_archives(args.cache, on_done=lambda name: bar.update())
    collections = read_collections(args.cache)
    if unknown := set(args.limit_sets or ()) - set(collections):
        raise ValueError(f"`--limit-sets` names {sorted(unknown)}, which are not among the {len(collections)} sets.")
    collections = {prefix: collections[prefix] for prefix in collections if prefix in (args.limit_sets or collections)}
    with tqdm(total=sum(info["total"] for info in collections.values()), desc="rendering", unit=" icons") as bar:
        render_sets(args.cache, collections, args.processes, on_done=bar.update)
    rendered = time.monotonic()

    emoji, tags = read_emoji(args.cache), read_tags(args.cache)
    rows = list(read_rows(args.cache, collections, tags, pool_tags(tags), emoji))
    held_out_emoji = read_held_out(args.emoji)
    slugs = {
        prefix: held_out_slugs(
            json.loads(document), [row.icon for row in rows if row.set == prefix], emoji, held_out_emoji.cells
        )
        for prefix, document in read_set_files(args.cache, EMOJI_FAMILIES.keys() & collections.keys())
    }
    with tqdm(desc="comparing", unit=" images") as bar:
        grouped = drop_and_group(rows, slugs, held_out_emoji, args.cache, on_done=bar.update)
    seen_texts = {*COLOURS, *held_out_emoji.train_texts, *(row.full_style for row in grouped.rows)}
    seen_texts |= {category for row in grouped.rows for category in row.categories}
    splits = split_rows(
        [row.family for row in grouped.rows],
        [row.name for row in grouped.rows],
        grouped.groups,
        grouped.stays.tolist(),
        sorted(seen_texts),
        read_brand_names(args.cache),
        seed=args.seed,
    )
    of_row, thinned = thin_out(grouped.rows, splits.of_row)
    dropped = grouped.dropped + thinned
    dropped["of a family that never trains, near-identical to another family's"] = splits.of_row.count(None)
    write(args, collections, grouped, splits, of_row, dropped)
    minutes = [(moment - started) / 60 for moment in (rendered, time.monotonic())]
    print(f"{minutes[1]:.1f} minutes, {minutes[0]:.1f} of them for fetching and rendering what was not there yet")


def write(args, collections, grouped, splits, of_row, dropped) -> None:
    """Writes splits, hashes, attribution and card."""
    words = HeldOutWords([*splits.words, *splits.pairs])
    rows = {split: [] for split in SPLITS}
    for row, split in zip(grouped.rows, of_row, strict=True):
        if split is not None:
            rows[split].append(without_held_out(row, words) if split == "train" else row)
    sizes = write_splits(args.output / "data", rows, args.seed, on_done=print)
    size = write_hash_list(args.output / HASH_LIST, grouped.rows, of_row, grouped.groups.tolist())
    print(f"{HASH_LIST}: {size / 1e6:.2f} MB")
    phrases = json.dumps({"words": splits.words, "pairs": splits.pairs}, indent=1) + "\n"
    atomic_write(args.output / "held_out.json", lambda path: path.write_text(phrases, encoding="utf-8"))
    images = Counter(row.set for split in SPLITS for row in rows[split])
    page = attribution(collections, images)
    atomic_write(args.output / "LICENSES" / "ATTRIBUTION.md", lambda path: path.write_text(page, encoding="utf-8"))
    summary = {
        "Families": len({row.family for row in grouped.rows}),
        "Near-identical pairs": len(grouped.pairs),
        "Groups of merged cells": len(set(grouped.groups.tolist())),
        "Words held out": len(splits.words),
        "Pairs of words held out": len(splits.pairs),
    }
    card = args.output / "README.md"
    template = card if card.exists() else REPOSITORY / "data" / "icons" / "README.md"
    text = fill_card(template.read_text(encoding="utf-8"), rows, sizes, dropped, summary)
    atomic_write(card, lambda path: path.write_text(text, encoding="utf-8"))
    print(count_table(rows, sizes))


if __name__ == "__main__":
    main()
