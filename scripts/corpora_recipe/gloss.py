# SPDX-License-Identifier: Apache-2.0
"""Reads WordNet's definitions: one line of text for each set of synonyms."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .folder import SPLITS, split_of


PACKAGE = "wordnet-base"
FILES = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


@dataclass(frozen=True)
class Gloss:
    """One set of synonyms. `key` is the letter of its file and its offset there, such as `n07739125`."""

    key: str
    lemmas: tuple[str, ...]
    gloss: str

    @property
    def text(self) -> str:
        """Such as `apple: fruit with red or yellow or green skin`."""
        return f"{', '.join(self.lemmas)}: {self.gloss}"


def read_glosses(folder: Path) -> Iterator[Gloss]:
    """Reads the files `data.noun`, `data.verb`, `data.adj` and `data.adv` of WordNet 3.0, one after the other."""
    for name, letter in FILES.items():
        path = folder / f"data.{name}"
        if not path.is_file():
            raise ValueError(f"{folder} has no {path.name}: is it not the folder of WordNet's database?")
        with path.open(encoding="utf-8") as lines:
            yield from parse_glosses(lines, letter, path.name)


def parse_glosses(lines: Iterable[str], letter: str, source: str = "data") -> Iterator[Gloss]:
    """
    Parses lines of a WordNet data file: `offset file type count word id ... | gloss`, without those of the licence.

    Args:
        lines: the lines of the file.
        letter: of the part of speech, the first of each `Gloss.key`.
        source: what errors call the file.
    """
    for number, line in enumerate(lines, start=1):
        # the lines of the licence begin with spaces
        if line.startswith(" ") or not line.strip():
            continue
        fields, bar, gloss = line.partition(" | ")
        words = fields.split()
        try:
            # WordNet counts words in hexadecimal, and each is followed by a number
            lemmas = words[4 : 4 + 2 * int(words[3], 16) : 2]
        except (IndexError, ValueError):
            lemmas = []
        if not bar or not lemmas or not gloss.strip():
            raise ValueError(f"{source}, line {number}, is not one of a WordNet data file: {line.strip()[:80]!r}")
        yield Gloss(letter + words[0], tuple(_lemma(word) for word in lemmas), " ".join(gloss.split()))


def split_glosses(glosses: Iterable[Gloss], validation_share: float) -> dict[str, list[dict]]:
    """Returns the rows `{"text": ...}` of each split, drawn by a hash of the key."""
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for gloss in glosses:
        rows[split_of(gloss.key, {"validation": validation_share})].append({"text": gloss.text})
    return rows


def count_table(rows: dict[str, list[dict]], version: str) -> str:
    """Returns a Markdown table of synsets, words and bytes of text in each split, and the package's version."""
    lines = [f"From {PACKAGE} {version}:", "", "| split | synsets | words | bytes of text |", "|---|---:|---:|---:|"]
    everything = [row["text"] for split in SPLITS for row in rows[split]]
    for name, texts in [*((split, [row["text"] for row in rows[split]]) for split in SPLITS), ("all", everything)]:
        words = sum(len(text.split()) for text in texts)
        size = sum(len(text.encode()) for text in texts)
        lines.append(f"| {name} | {len(texts):,} | {words:,} | {size:,} |")
    shared = len({row["text"] for row in rows["validation"]} & {row["text"] for row in rows["train"]})
    return "\n".join([*lines, "", f"Texts of `validation` that stand word for word in `train` too: {shared:,}."])


def _lemma(word: str) -> str:
    # adjectives carry where they may stand: `galore(ip)`
    return re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ")
