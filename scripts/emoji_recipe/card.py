# SPDX-License-Identifier: Apache-2.0
"""Fills the numbers of the data set card, so that every number in it is counted."""

import re
from collections import Counter
from collections.abc import Sequence

import yaml

from emoji_recipe.cells import SPLITS, STYLES, drawing_cell
from image_sets.counts import replace_counts


def fill_card(card: str, rows: dict[str, Sequence[dict]], sizes: dict[str, int], largest_component: str) -> str:
    """
    Returns the card with its counts and its `dataset_info` replaced.

    Args:
        card: the text of a `README.md` with a YAML head and the two `counts` comments.
        rows: the rows of each split, with `style`, `label` and `image` (`{"bytes": ...}`).
        sizes: bytes of each split's parquet file.
        largest_component: what the largest group of merged cells is.
    """
    head = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    if head is None:
        raise ValueError("`card` needs a YAML head between `---` lines.")
    metadata = yaml.safe_load(head.group(1))
    metadata["dataset_info"]["splits"] = [
        {
            "name": split,
            "num_bytes": sum(len(row["image"]["bytes"]) for row in rows[split]),
            "num_examples": len(rows[split]),
        }
        for split in SPLITS
    ]
    metadata["dataset_info"]["download_size"] = sum(sizes.values())
    metadata["dataset_info"]["dataset_size"] = sum(split["num_bytes"] for split in metadata["dataset_info"]["splits"])
    counts = count_table(rows) + "\n\n" + count_notes(rows, largest_component)
    yaml_head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{yaml_head}---\n" + replace_counts(card[head.end() :], counts)


def count_table(rows: dict[str, Sequence[dict]]) -> str:
    """Returns a Markdown table of the number of images by style and split."""
    counts = Counter((row["style"], split) for split in SPLITS for row in rows[split])
    lines = [f"| style | {' | '.join(SPLITS)} | all |", "|---|" + "---:|" * (len(SPLITS) + 1)]
    for style in STYLES:
        numbers = [counts[style, split] for split in SPLITS]
        lines.append(f"| {style} | " + " | ".join(f"{number:,}" for number in [*numbers, sum(numbers)]) + " |")
    numbers = [len(rows[split]) for split in SPLITS]
    lines.append("| all | " + " | ".join(f"{number:,}" for number in [*numbers, sum(numbers)]) + " |")
    return "\n".join(lines)


def count_notes(rows: dict[str, Sequence[dict]], largest_component: str) -> str:
    """Returns a Markdown list of further counts."""
    everything = [row for split in SPLITS for row in rows[split]]
    cells = {split: {drawing_cell(row["label"], row["style"]) for row in rows[split]} for split in SPLITS}
    words = {word for row in everything for word in re.findall(r"\w+", " ".join([row["label"], *row["keywords"]]))}
    keywords = sum(len(row["keywords"]) for row in everything) / len(everything)
    return "\n".join(
        [
            f"- Labels: {len({row['label'] for row in everything}):,}; groups: "
            f"{len({row['group'] for row in everything})}; subgroups: "
            f"{len({row['subgroup'] for row in everything})}; distinct words in labels and keywords: {len(words):,}.",
            f"- Keywords per image: {keywords:.1f} on average.",
            "- (base label, drawing family) cells: "
            + ", ".join(f"{len(cells[split]):,} in {split}" for split in SPLITS)
            + ".",
            f"- Largest group of merged cells: {largest_component}.",
        ]
    )
