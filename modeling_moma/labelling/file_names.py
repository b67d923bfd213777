# SPDX-License-Identifier: Apache-2.0
"""What names of files say of their images: the words in them, and the tags that a memory has of the names in them.

Shape suffixes:
    N files, Q queries.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from .memory import ImageMemory


Words = tuple[str, ...]

_WORD = re.compile(r"[^\W_]+")
# in names such as `ArrowLeft` and `arrowLeft`
_HUMP = re.compile(r"(?<=[a-z\d])(?=[A-Z])")


def file_name_shares(files: Iterable[str], queries: Sequence[str], memory: ImageMemory | None = None) -> torch.Tensor:
    """Return the shares of the words in names of files that speak of queries.

    Words do that are the query's, in its order; or, by a memory, that are a name it keeps of which the query is a tag.
    What counts is the largest share. Of `cog-outline.svg` half speaks of `cog`, and half of `settings` where that is a
    tag of `cog`.
    """
    wanted = [_words(query) for query in queries]
    tags = {} if memory is None else _tags_of_names(memory)
    longest = max(map(len, (*tags, *wanted)), default=0)
    rows = []
    for file in files:
        words = _words(Path(file).stem)
        # runs grow, so that the largest share stays
        spoken_of: dict[Words, float] = {}
        for length in range(1, min(len(words), longest) + 1):
            for start in range(len(words) - length + 1):
                run = words[start : start + length]
                spoken_of.update(dict.fromkeys((run, *tags.get(run, ())), length / len(words)))
        rows.append([spoken_of.get(query, 0.0) if query else 0.0 for query in wanted])
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(wanted))


def with_file_names(scores_NQ: torch.Tensor, shares_NQ: torch.Tensor, weight: float) -> torch.Tensor:
    """Return scores of images and shares of file names as one: `log((1 - weight) exp(score) + weight share)`."""
    counts = torch.tensor(weight, dtype=torch.float64)
    return torch.logaddexp(scores_NQ + (1 - counts).log(), shares_NQ.log() + counts.log())


def _words(text: str) -> Words:
    # macOS writes `é` in names of files as a letter and a sign, of which a word would end
    composed = unicodedata.normalize("NFC", text)
    return tuple(_singular(word.casefold()) for word in _WORD.findall(_HUMP.sub(" ", composed)))


def _singular(word: str) -> str:
    """Return a word without the ending of an English plural, by Harman's S stemmer ("How effective is suffixing?")."""
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    return word[:-1] if word.endswith("s") and not word.endswith(("us", "ss")) else word


def _tags_of_names(memory: ImageMemory) -> dict[Words, set[Words]]:
    """Return the tags of each kept name; names that are alike share theirs."""
    found = defaultdict(set)
    for name, tags in zip(memory.names, memory.tags, strict=True):
        found[_words(name)].update(map(_words, tags))
    return found
