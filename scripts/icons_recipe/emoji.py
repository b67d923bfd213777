# SPDX-License-Identifier: Apache-2.0
"""Emoji among the icons: their names by emojibase, flags of places, and which of them the emoji set holds out."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from emoji_recipe.cells import SKIN_TONE, base_label, drawing_cell
from emoji_recipe.sources import Emoji, label_slug, normalize_code_points
from icons_recipe.drawing import decode, small_grey
from icons_recipe.names import IconName, words


# which family of the emoji set each of Iconify's sets of emoji belongs to
EMOJI_FAMILIES = {
    "noto": "noto",
    "noto-v1": "noto v1",
    "twemoji": "twemoji",
    "fluent-emoji-flat": "fluent",
    "fluent-emoji-high-contrast": "fluent",
    "emojione": "emojione",
    "emojione-monotone": "emojione",
    "fxemoji": "fxemoji",
}
_FLAG_SETS = frozenset(("cif", "circle-flags", "flag", "flagpack"))
_TONE_ENDING = re.compile(r"((?:-(?:medium-light|medium-dark|light|medium|dark)-skin-tone)+)$")
_REGIONAL_A = 0x1F1E6


@dataclass(frozen=True)
class HeldOutEmoji:
    """What the emoji set holds out: cells of (base label, family), and 16x16 greys of the images.

    `train_greys` are those of its train split, `train_texts` its labels and keywords.
    """

    cells: frozenset[tuple[str, str]]
    greys: np.ndarray
    train_greys: np.ndarray
    train_texts: tuple[str, ...]


def read_held_out(folder: Path) -> HeldOutEmoji:
    """Reads the committed emoji set, laid out as in `data/emoji`."""
    tables = {
        split: pq.read_table(sorted((folder / "data").glob(f"{split}-*.parquet"))).to_pylist()
        for split in ("train", "validation", "test")
    }
    held_out = tables["validation"] + tables["test"]
    return HeldOutEmoji(
        cells=frozenset(drawing_cell(row["label"], row["style"]) for row in held_out),
        greys=_greys(held_out),
        train_greys=_greys(tables["train"]),
        train_texts=tuple({text for row in tables["train"] for text in (row["label"], *row["keywords"])}),
    )


def match_emoji(icon_set: dict, slugs: list[str], emoji: dict[str, Emoji]) -> dict[str, Emoji]:
    """Returns the emoji that each file name of a set of emoji stands for, by code point or by name, where known."""
    prefix = icon_set["prefix"]
    by_code = {slug: emoji.get(normalize_code_points(code)) for code, slug in icon_set.get("chars", {}).items()}
    by_name = {}
    for item in emoji.values():
        slug = label_slug(item.label)
        if prefix.startswith("emojione"):
            slug = re.sub(r"^flag-", "flag-for-", slug)
        by_name.setdefault(slug.replace("-", "") if prefix == "fxemoji" else slug, item)
    matches = {slug: by_code.get(slug) or by_name.get(slug) for slug in slugs}
    return {slug: item for slug, item in matches.items() if item is not None}


def emoji_name(label: str) -> IconName:
    """Returns the name of an emoji, with its tones of skin as style: `waving hand` and `dark skin tone`."""
    tones = dict.fromkeys(SKIN_TONE.findall(label))
    return IconName(" ".join(words(label_slug(base_label(label)))), " ".join(words(" ".join(tones))))


def read_emoji_names(icon_set: dict, slugs: list[str], emoji: dict[str, Emoji]) -> dict[str, IconName]:
    """As `read_names`, for sets of emoji and of flags of places. Other sets give nothing."""
    if icon_set["prefix"] in _FLAG_SETS:
        return _flag_names(slugs, emoji)
    if icon_set["prefix"] not in EMOJI_FAMILIES:
        return {}
    names = {slug: _name_by_slug(slug) for slug in slugs}
    return names | {slug: emoji_name(item.label) for slug, item in match_emoji(icon_set, slugs, emoji).items()}


def held_out_slugs(icon_set: dict, slugs: list[str], emoji: dict[str, Emoji], cells: frozenset) -> set[str]:
    """Returns the file names of a set of emoji whose cell the emoji set holds out, whatever their tones of skin."""
    family = EMOJI_FAMILIES.get(icon_set["prefix"])
    if family is None:
        return set()
    names = read_emoji_names(icon_set, slugs, emoji)
    held_out = {emoji_name(label).name for label, held_family in cells if held_family == family}
    matched = match_emoji(icon_set, slugs, emoji)
    by_label = {slug for slug, item in matched.items() if (base_label(item.label), family) in cells}
    return by_label | {slug for slug, name in names.items() if name.name in held_out}


def _name_by_slug(slug):
    tones = _TONE_ENDING.search(slug)
    name = slug.removesuffix(tones[1]) if tones else slug
    parts = dict.fromkeys(re.findall(r"(?:medium-)?(?:light|dark|medium)(?=-skin)", tones[1])) if tones else ()
    return IconName(" ".join(words(name)), " ".join(f"{' '.join(words(part))} skin tone" for part in parts))


def _flag_names(slugs, emoji):
    names = {}
    for slug in slugs:
        code, _, style = slug.partition("-")
        points = "-".join(f"{_REGIONAL_A + ord(letter) - ord('a'):X}" for letter in code if "a" <= letter <= "z")
        item = emoji.get(points)
        if len(code) == 2 and style in ("", "1x1", "4x3") and item is not None:
            names[slug] = IconName(" ".join(words(label_slug(item.label))), style)
    return names


def _greys(rows):
    return np.stack([small_grey(decode(row["image"]["bytes"])) for row in rows])
