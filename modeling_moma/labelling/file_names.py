# SPDX-License-Identifier: Apache-2.0
"""What names of files say of their images: the words in them, and the tags that a memory has of the names in them.

Shape suffixes:
    N files, Q queries.
"""

import functools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from .memory import ImageMemory


Words = tuple[str, ...]

# that have a word by which others are split: rare ones are often wrong, such as `ar` and `ray`
LEAST_NAMES = 3
# of a query that may be a part of a word
LEAST_LETTERS = 3

_WORD = re.compile(r"[^\W_]+")
# in names such as `ArrowLeft` and `arrowLeft`
_HUMP = re.compile(r"(?<=[a-z\d])(?=[A-Z])")


def file_name_shares(files: Iterable[str], queries: Sequence[str], memory: ImageMemory | None = None) -> torch.Tensor:
    """Return the shares of the words in names of files that speak of queries.

    Words do that are the query's, in its order; or, by a memory, that are a name it keeps of which the query is a tag.
    What counts is the largest share. Of `cog-outline.svg` half speaks of `cog`, and half of `settings` where that is a
    tag of `cog`. A word such as `arrowleft` is `arrow` and `left` where names of the memory have these; of a word that
    begins or ends with a query of three letters or more, half of its share of letters counts.
    """
    plain = [_words(query) for query in queries]
    joined = ["".join(query) for query in plain]
    split = _Splitter(() if memory is None else memory.names)
    wanted = [split(query) for query in plain]
    tags = {} if memory is None else _tags_of_names(memory, split)
    longest = max(map(len, (*tags, *wanted)), default=0)
    rows = []
    for file in files:
        written = _words(Path(file).stem)
        words = split(written)
        # runs grow, so that the largest share stays
        spoken_of: dict[Words, float] = {}
        for length in range(1, min(len(words), longest) + 1):
            for start in range(len(words) - length + 1):
                run = words[start : start + length]
                spoken_of.update(dict.fromkeys((run, *tags.get(run, ())), length / len(words)))
        parts = [_affix_share(written, query) for query in joined]
        rows.append([max(spoken_of.get(query, 0.0), part) if query else 0.0 for query, part in zip(wanted, parts)])
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(wanted))


def with_file_names(scores_NQ: torch.Tensor, shares_NQ: torch.Tensor, weight: float) -> torch.Tensor:
    """Return scores of images and shares of file names as one: `log((1 - weight) exp(score) + weight share)`."""
    counts = torch.tensor(weight, dtype=torch.float64)
    return torch.logaddexp(scores_NQ + (1 - counts).log(), shares_NQ.log() + counts.log())


# names of a memory have many tags in common
@functools.cache
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


class _Splitter:
    """Splits words into the fewest that several names have; others stay whole."""

    def __init__(self, names: Iterable[str]):
        counts = Counter(word for name in names for word in set(_words(name)))
        self._known = {word for word, count in counts.items() if count >= LEAST_NAMES and len(word) > 1}
        self._parts = functools.cache(self._split)

    def __call__(self, words: Words) -> Words:
        return tuple(part for word in words for part in self._parts(word))

    def _split(self, word: str) -> Words:
        best: dict[int, Words] = {0: ()}
        for stop in range(1, len(word) + 1):
            ends = [(*best[start], word[start:stop]) for start in best if word[start:stop] in self._known]
            if ends:
                best[stop] = min(ends, key=len)
        return best.get(len(word), (word,))


def _affix_share(words: Words, query: str) -> float:
    """Return the share of words that speaks of a query with which one of them begins or ends."""
    if len(query) < LEAST_LETTERS:
        return 0.0
    longer = [len(word) for word in words if word != query and (word.startswith(query) or word.endswith(query))]
    return len(query) / min(longer) / 2 / len(words) if longer else 0.0


def _tags_of_names(memory: ImageMemory, split: _Splitter) -> dict[Words, set[Words]]:
    """Return the tags of each kept name; names that are alike share theirs."""
    found = defaultdict(set)
    split_tag = functools.cache(lambda tag: split(_words(tag)))
    for name, tags in zip(memory.names, memory.tags, strict=True):
        found[split(_words(name))].update(map(split_tag, tags))
    return found
