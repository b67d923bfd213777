# SPDX-License-Identifier: Apache-2.0
"""Counts for the cards of the data sets, and the attribution of every set of icons."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import yaml

from cards import replace_block
from image_sets.emoji import FAMILIES, drawing_cell
from image_sets.icon_images import COLOURS
from image_sets.icon_rows import SPLITS, Row
from image_sets.splits import EMOJI_SPLITS


def fill_emoji_card(card: str, rows: dict[str, Sequence[dict]], sizes: dict[str, int], largest: str) -> str:
    """The card with its counts and its `dataset_info`; `largest` is what the largest group of merged cells is."""
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    info = metadata["dataset_info"]
    info["splits"] = [
        {
            "name": split,
            "num_bytes": sum(len(row["image"]["bytes"]) for row in rows[split]),
            "num_examples": len(rows[split]),
        }
        for split in EMOJI_SPLITS
    ]
    info["download_size"] = sum(sizes.values())
    info["dataset_size"] = sum(split["num_bytes"] for split in info["splits"])
    counts = f"{emoji_table(rows)}\n\n{_emoji_notes(rows, largest)}"
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n{replace_block(body, counts)}"


def emoji_table(rows: dict[str, Sequence[dict]]) -> str:
    """A Markdown table of the number of images by style and split."""
    counts = Counter(
        (style, split) for split in EMOJI_SPLITS for row in rows[split] for style in (row["style"], "all")
    )
    lines = [f"| style | {' | '.join(EMOJI_SPLITS)} | all |", "|---|" + "---:|" * (len(EMOJI_SPLITS) + 1)]
    for style in (*FAMILIES, "all"):
        numbers = [counts[style, split] for split in EMOJI_SPLITS]
        lines.append(_line(style, *numbers, sum(numbers)))
    return "\n".join(lines)


def _line(name, *numbers):
    return f"| {name} | " + " | ".join(f"{number:,}" for number in numbers) + " |"


def _emoji_notes(rows, largest):
    everything = [row for split in EMOJI_SPLITS for row in rows[split]]
    cells = {split: {drawing_cell(row["label"], row["style"]) for row in rows[split]} for split in EMOJI_SPLITS}
    words = {word for row in everything for word in re.findall(r"\w+", " ".join([row["label"], *row["keywords"]]))}
    keywords = sum(len(row["keywords"]) for row in everything) / len(everything)
    labels, groups, subgroups = (len({row[name] for row in everything}) for name in ("label", "group", "subgroup"))
    return (
        f"- Labels: {labels:,}; groups: {groups}; subgroups: {subgroups}; distinct words in labels and keywords: "
        f"{len(words):,}.\n"
        f"- Keywords per image: {keywords:.1f} on average.\n"
        "- (base label, drawing family) cells: "
        + ", ".join(f"{len(cells[split]):,} in {split}" for split in EMOJI_SPLITS)
        + f".\n- Largest group of merged cells: {largest}."
    )


def icon_counts(
    rows: dict[str, Sequence[Row]], sizes: dict[str, int], dropped: Counter, summary: dict[str, int]
) -> str:
    """What the card of icons counts: each split, what was left out by reason, families, and a summary."""
    every = {**rows, "all": [row for split in SPLITS for row in rows[split]]}
    bytes_of = {**sizes, "all": sum(sizes.values())}
    lines = ["| split | images | cells | names | sets | MB |", "|---|---:|---:|---:|---:|---:|"]
    for split in (*SPLITS, "all"):
        columns = zip(*((row.cell, row.name, row.set) for row in every[split]))
        numbers = [len(set(values)) for values in columns] or [0, 0, 0]
        lines.append(f"{_line(split, len(every[split]), *numbers)} {bytes_of[split] / 1e6:.1f} |")
    notes, families = _icon_notes(every["all"], summary), _family_table(every["all"])
    left_out = [f"| {reason} | {count:,} |" for reason, count in dropped.most_common()]
    return "\n".join([*lines, "", notes, "", "| left out | icons |", "|---|---:|", *left_out, "", families])


def _icon_notes(rows, summary):
    colours, licences = Counter(row.colour for row in rows), Counter(row.license for row in rows)
    tagged, aliased, sorted_in = (
        sum(bool(getattr(row, field)) for row in rows) for field in ("keywords", "aliases", "categories")
    )
    named = ", ".join(f"{colour} {colours[colour]:,}" for colour in COLOURS)
    return "\n".join(
        [
            f"- Colours of the monochrome icons: {named}. In their own colours: {colours[None]:,}.",
            f"- With keywords: {tagged:,}; with aliases: {aliased:,}; with categories: {sorted_in:,}.",
            "- By licence: " + ", ".join(f"{name} {count:,}" for name, count in licences.most_common()) + ".",
            *(f"- {what}: {count:,}." for what, count in summary.items()),
        ]
    )


def _family_table(rows):
    """The families that hold several sets."""
    sets = defaultdict(set)
    for row in rows:
        sets[row.family].add(row.set)
    lines = [f"| {family} | {', '.join(sorted(found))} |" for family, found in sorted(sets.items()) if len(found) > 1]
    return "\n".join(["| family | its sets |", "|---|---|", *lines])


def attribution(collections: dict[str, dict], images: Counter) -> str:
    """The attribution of every set as a Markdown page, by Iconify's entry and the number of images of each."""
    lines = [
        "# Attribution",
        "",
        "Written by `scripts/build_images.py` from what Iconify says of each set. Changes made to the images",
        "of every set: rendered at 64x64 pixels in the middle of a white square, monochrome ones painted in a colour,",
        "animated ones brought to a stand, stored as lossy WebP. The makers named here do not endorse this data set.",
        "",
        "| set | name | by | licence | images |",
        "|---|---|---|---|---:|",
    ]
    for prefix, info in collections.items():
        author, licence = info["author"], info["license"]
        lines.append(
            f"| {prefix} | {info['name']} | {_link(author['name'], author.get('url'))} | "
            f"{_link(licence['spdx'], licence.get('url'))} | {images[prefix]:,} |"
        )
    return "\n".join(lines) + "\n"


def _link(text, url):
    plain = text.replace("|", "/")
    return f"[{plain}]({url})" if url else plain
