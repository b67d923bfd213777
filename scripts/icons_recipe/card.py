# SPDX-License-Identifier: Apache-2.0
"""Fills the numbers of the data set card, and writes the attribution of every set."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from icons_recipe.drawing import COLOURS
from icons_recipe.rows import Row
from icons_recipe.splits import SPLITS
from image_sets.counts import replace_counts


def fill_card(
    card: str, rows: dict[str, Sequence[Row]], sizes: dict[str, int], dropped: Counter, summary: dict[str, int]
) -> str:
    """
    Returns the card with its counts replaced.

    Args:
        card: the text of a `README.md` with the two `counts` comments.
        rows: the rows of each split.
        sizes: bytes of each split's files.
        dropped: how many icons were left out, by reason.
        summary: further counts, by what they are.
    """
    parts = (count_table(rows, sizes), count_notes(rows, summary), dropped_table(dropped), family_table(rows))
    return replace_counts(card, "\n\n".join(parts))


def count_table(rows: dict[str, Sequence[Row]], sizes: dict[str, int]) -> str:
    """Returns a Markdown table of what each split holds."""
    lines = ["| split | images | cells | names | sets | MB |", "|---|---:|---:|---:|---:|---:|"]
    for split in SPLITS:
        numbers = [len(rows[split]), *(len(set(values)) for values in _columns(rows[split]))]
        lines.append(f"| {split} | " + " | ".join(f"{n:,}" for n in numbers) + f" | {sizes[split] / 1e6:.1f} |")
    everything = [row for split in SPLITS for row in rows[split]]
    numbers = [len(everything), *(len(set(values)) for values in _columns(everything))]
    lines.append("| all | " + " | ".join(f"{n:,}" for n in numbers) + f" | {sum(sizes.values()) / 1e6:.1f} |")
    return "\n".join(lines)


def count_notes(rows: dict[str, Sequence[Row]], summary: dict[str, int]) -> str:
    """Returns a Markdown list of further counts."""
    everything = [row for split in SPLITS for row in rows[split]]
    colours = Counter(row.colour for row in everything)
    tagged = sum(bool(row.keywords) for row in everything)
    licences = Counter(row.license for row in everything)
    named = ", ".join(f"{colour} {colours[colour]:,}" for colour in COLOURS)
    return "\n".join(
        [
            f"- Colours of the monochrome icons: {named}. In their own colours: {colours[None]:,}.",
            f"- With keywords: {tagged:,}; with aliases: {sum(bool(row.aliases) for row in everything):,}; "
            f"with categories: {sum(bool(row.categories) for row in everything):,}.",
            "- By licence: " + ", ".join(f"{name} {count:,}" for name, count in licences.most_common()) + ".",
            *(f"- {what}: {count:,}." for what, count in summary.items()),
        ]
    )


def dropped_table(dropped: Counter) -> str:
    """Returns a Markdown table of what was left out, and why."""
    lines = ["| left out | icons |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {reason} | {count:,} |" for reason, count in dropped.most_common())])


def family_table(rows: dict[str, Sequence[Row]]) -> str:
    """Returns a Markdown table of the families that hold several sets."""
    sets = defaultdict(set)
    for split in SPLITS:
        for row in rows[split]:
            sets[row.family].add(row.set)
    lines = ["| family | its sets |", "|---|---|"]
    several = [(family, members) for family, members in sorted(sets.items()) if len(members) > 1]
    return "\n".join([*lines, *(f"| {family} | {', '.join(sorted(members))} |" for family, members in several)])


def attribution(collections: dict[str, dict], images: Counter) -> str:
    """
    Returns the attribution of every set as a Markdown page.

    Args:
        collections: Iconify's entry of each set.
        images: the number of images of each set in this data set.
    """
    lines = [
        "# Attribution",
        "",
        "Written by `scripts/build_icons_dataset.py` from what Iconify says of each set. Changes made to the images",
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


def _columns(rows):
    return [row.cell for row in rows], [row.name for row in rows], [row.set for row in rows]


def _link(text, url):
    plain = text.replace("|", "/")
    return f"[{plain}]({url})" if url else plain
