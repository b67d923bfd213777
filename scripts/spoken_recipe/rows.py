# SPDX-License-Identifier: Apache-2.0
"""What is spoken, and in which split it stands: words, and the labels of emoji with their drawings."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from .speech import Voice, choose_voices


SPLITS = ("train", "validation", "test")
# shares of the held-out splits, of all words and of all labels
HELD_OUT_WORDS = {"validation": 0.025, "test": 0.05}
HELD_OUT_LABELS = {"validation": 0.04, "test": 0.1}
# letters of a word
LETTERS = (3, 14)
# voices that speak each word, and each label of a drawing
VOICES_A_WORD, VOICES_A_DRAWING = 3, 4
# the designer whose drawings are taken: one for a label, so that a small model may learn what belongs to a word
STYLE = "noto"
# shares of the drawings in `train` by what comes in which order: a sound, perhaps the label written, and the drawing
ORDERS = {("audio", "text", "image"): 0.5, ("audio", "image"): 0.35, ("image", "audio"): 0.15}
HELD_OUT_ORDER = ("audio", "image")
# columns of words and of lists of words
_TEXTS = ("label", "name", "keywords", "aliases")


@dataclass(frozen=True)
class SpokenWord:
    """A word and a voice."""

    word: str
    voice: Voice


@dataclass(frozen=True)
class SpokenDrawing:
    """A label, a voice, a drawing of the emoji, and the order in which they stand, of `ORDERS`."""

    label: str
    voice: Voice
    image: dict[str, Any]
    order: tuple[str, ...]


def draw(name: str) -> float:
    """Returns a number in [0, 1), always the same one for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def split_of(name: str, held_out: dict[str, float]) -> str:
    """Returns the split of a name, drawn by a hash of it."""
    place = draw(name)
    for split, share in held_out.items():
        if place < share:
            return split
        place -= share
    return "train"


def read_words(files: Iterable[Path]) -> list[str]:
    """Returns the words in labels, names, tags and aliases of image sets, of `LETTERS` letters, in order."""
    words: set[str] = set()
    for path in files:
        names = [name for name in _TEXTS if name in pq.read_schema(path).names]
        for column in pq.read_table(path, columns=names).columns:
            for value in column.to_pylist():
                for text in value if isinstance(value, list) else [value or ""]:
                    words.update(re.findall(r"[a-z]+", text.lower()))
    return sorted(word for word in words if LETTERS[0] <= len(word) <= LETTERS[1])


def split_words(words: Sequence[str], label_splits: dict[str, str]) -> dict[str, list[SpokenWord]]:
    """
    Returns each split's words with their voices, in an order drawn by hash.

    Args:
        words: all of them.
        label_splits: the split of each label; a word that is itself a label stands where the label does.
    """
    rows: dict[str, list[SpokenWord]] = {split: [] for split in SPLITS}
    for word in words:
        split = label_splits.get(word) or split_of(f"word/{word}", HELD_OUT_WORDS)
        rows[split] += [SpokenWord(word, voice) for voice in choose_voices(word, VOICES_A_WORD)]
    return {
        split: sorted(found, key=lambda row: draw(f"{row.word}/{row.voice.name}")) for split, found in rows.items()
    }


def split_labels(labels: Iterable[str]) -> dict[str, str]:
    """Returns the split of each label."""
    return {label: split_of(f"label/{label}", HELD_OUT_LABELS) for label in labels}


def read_emoji(path: Path) -> list[dict[str, Any]]:
    """Returns `label` and `image` (its file's bytes) of the rows of one split that are of `STYLE`."""
    rows = pq.read_table(path, columns=["label", "style", "image"]).to_pylist()
    return [{"label": row["label"], "image": row["image"]} for row in rows if row["style"] == STYLE]


def order_of(name: str) -> tuple[str, ...]:
    """Returns one of `ORDERS`, drawn by a hash of a name."""
    place = draw(f"order/{name}")
    for order, share in ORDERS.items():
        if place < share:
            return order
        place -= share
    return HELD_OUT_ORDER


def split_drawings(rows: Sequence[dict[str, Any]], label_splits: dict[str, str]) -> dict[str, list[SpokenDrawing]]:
    """
    Returns each split's drawings with voices: of each label in `train` several, of each other label one.

    Args:
        rows: of `read_emoji`, those whose drawings and written labels are trained on.
        label_splits: the split of each label.
    """
    drawings: dict[str, list[SpokenDrawing]] = {split: [] for split in SPLITS}
    for row in rows:
        label, split = row["label"], label_splits[row["label"]]
        for voice in choose_voices(label, VOICES_A_DRAWING if split == "train" else 1):
            order = order_of(f"{label}/{voice.name}") if split == "train" else HELD_OUT_ORDER
            drawings[split].append(SpokenDrawing(label, voice, row["image"], order))
    return {
        split: sorted(found, key=lambda row: draw(f"{row.label}/{row.voice.name}"))
        for split, found in drawings.items()
    }
