# SPDX-License-Identifier: Apache-2.0
"""What names of files say of their images: the words in them, and the tags that a memory has of the names in them.

Shape suffixes:
    N files, Q queries.
"""

import re
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

    Those do that are the query's, in its order; or, by a memory, the longest name that it keeps among a file's words,
    where the query is a tag of that name. What counts is the larger share. Of `cog-outline.svg` half speaks of `cog`,
    and half of `settings` where that is a tag of `cog`.

    Args:
        files (`Iterable[str]`):
            N paths, of which the last part counts, without its ending.
        queries (`Sequence[str]`):
            Q of them, words each. Capital letters and signs count for nothing.
        memory ([`ImageMemory`], *optional*):
            gives the tags.

    Returns:
        `torch.Tensor`: `[N, Q]`, float64, from 0 to 1.
    """
    wanted = [_words(query) for query in queries]
    tags = {} if memory is None else _tags_of_names(memory)
    longest = max(map(len, tags), default=0)
    rows = []
    for file in files:
        words = _words(Path(file).stem)
        named = _longest_names(words, tags, longest)
        tagged = {tag for name in named for tag in tags[name]}
        share_of_name = len(named[0]) / len(words) if named else 0.0
        rows.append(
            [
                max(
                    len(query) / len(words) if query and query in _runs(words, len(query)) else 0.0,
                    share_of_name if query in tagged else 0.0,
                )
                for query in wanted
            ]
        )
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(wanted))


def with_file_names(scores_NQ: torch.Tensor, shares_NQ: torch.Tensor, weight: float) -> torch.Tensor:
    """Return scores of images and shares of file names as one: `log((1 - weight) exp(score) + weight share)`.

    Args:
        scores_NQ (`torch.Tensor`):
            see [`ImageLabeler.match`].
        shares_NQ (`torch.Tensor`):
            see [`file_name_shares`].
        weight (`float`):
            what file names count for, from 0 to 1.
    """
    if weight == 0:
        return scores_NQ
    counts = torch.tensor(weight, dtype=torch.float64)
    return torch.logaddexp(scores_NQ + (1 - counts).log(), shares_NQ.log() + counts.log())


def _words(text: str) -> Words:
    return tuple(word.casefold() for word in _WORD.findall(_HUMP.sub(" ", text)))


def _runs(words: Words, length: int) -> list[Words]:
    """Return so many words that stand side by side, from each place on."""
    return [words[start : start + length] for start in range(len(words) - length + 1)]


def _tags_of_names(memory: ImageMemory) -> dict[Words, set[Words]]:
    """Return the tags of each kept name that has any."""
    found = defaultdict(set)
    for name, tags in zip(memory.names, memory.tags, strict=True):
        found[_words(name)].update(_words(tag) for tag in tags)
    return {name: tags - {()} for name, tags in found.items() if name}


def _longest_names(words: Words, names: dict[Words, set[Words]], longest: int) -> list[Words]:
    """Return the names of most words among those of a file."""
    for length in range(min(len(words), longest), 0, -1):
        if found := [run for run in _runs(words, length) if run in names]:
            return found
    return []


__all__ = ["file_name_shares", "with_file_names"]
