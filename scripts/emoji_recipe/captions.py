# SPDX-License-Identifier: Apache-2.0
"""Reads generated captions and says how many are right."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from emoji_recipe.cells import STYLES
from emoji_recipe.judge import LEVELS, accuracies
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.data.kinds.captions import CaptionDocuments, CaptionKind
from modeling_moma.training.recipe import read_recipe


RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "emoji.yaml"


def emoji_kind() -> CaptionKind:
    """What the recipe of the emoji says of their captions."""
    return read_recipe(RECIPE).sources[0].kind


def emoji_documents(rows: Sequence[dict], processor) -> CaptionDocuments:
    """Training documents of rows with `codes` `[codings, image_seq_length]`, `style`, `label` and `keywords`."""
    return CaptionDocuments.from_rows("emoji", emoji_kind(), rows, DocumentEncoder(processor))


def label_caption(style: str, label: str) -> str:
    """The caption of an image, `"noto: red apple"`."""
    return emoji_kind().templates()[0].render({"style": style, "label": label})


def parse_caption(text: str) -> tuple[str, str] | None:
    """
    Splits `"STYLE: LABEL"`.

    Args:
        text: a generated caption, such as `"noto: flag: Norway"`, whose label is `"flag: Norway"`.

    Returns:
        `tuple[str, str]`: style and label, or `None` where the text is no caption of a known style (keyword captions,
        `"noto tags: ..."`, have no label).
    """
    style, colon, label = text.strip().partition(": ")
    if not colon or style not in STYLES or not label:
        return None
    return style, label


def label_table(rows: Iterable[dict]) -> dict[str, dict]:
    """Maps each label to `{"label", "subgroup", "group"}`; every label has one place in the data set."""
    return {row["label"]: {level: row[level] for level in LEVELS} for row in rows}


def caption_accuracies(texts: Sequence[str], wanted: Sequence[dict], table: dict[str, dict]) -> dict[str, float]:
    """
    Scores generated captions. Text that cannot be parsed and labels that the data set lacks count as wrong.

    Args:
        texts: one caption of each image.
        wanted: rows with `style`, `label`, `subgroup` and `group`. Same length.
        table: from `label_table`.

    Returns:
        `dict[str, float]`: shares in [0, 1]: `label` (exact match), `subgroup`, `group`, `style`, and `known_label`,
        the share of captions whose label exists.
    """
    parsed = [parse_caption(text) for text in texts]
    found = [table.get(caption[1]) if caption else None for caption in parsed]
    result = accuracies(found, wanted)
    styles = [caption is not None and caption[0] == row["style"] for caption, row in zip(parsed, wanted, strict=True)]
    result["style"] = sum(styles) / len(styles)
    result["known_label"] = sum(row is not None for row in found) / len(found)
    return result


def majority_accuracies(train: Sequence[dict], wanted: Sequence[dict]) -> dict[str, float]:
    """Shares of `wanted` that the most frequent label, subgroup and group of `train` would get right."""
    most_frequent = {level: Counter(row[level] for row in train).most_common(1)[0][0] for level in LEVELS}
    return accuracies([most_frequent] * len(wanted), wanted)
