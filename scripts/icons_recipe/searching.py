# SPDX-License-Identifier: Apache-2.0
"""Search of icons by tags, also those that their names lack: queries, recall, and a lexical search to compare with."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from icons_recipe.names import words
from icons_recipe.samples import normalised, order
from icons_recipe.words import stems
from modeling_moma.utils.errors import needs_extra


# results that somebody looks at
TOP = 10
# neighbours whose words stand for an image
NEIGHBOURS = 10


@dataclass(frozen=True)
class Query:
    """Words to look for.

    Args:
        text: a tag or an alias.
        wanted: icons that have it.
        left_out: other icons that have it; they are no results, neither right nor wrong.
    """

    text: str
    wanted: frozenset[int]
    left_out: frozenset[int]


def queries_of(rows: Sequence[dict], limit: int, in_names: bool = False) -> list[Query]:
    """
    Returns tags and aliases of icons.

    Args:
        rows: `icon`, `name`, `keywords` and `aliases` of each icon.
        limit: queries at most, chosen by hash.
        in_names: all icons that have a query are wanted, whatever they are called. By default only those in whose file
            name and name none of its words stands, and the others are left out.
    """
    tagged = defaultdict(set)
    for place, row in enumerate(rows):
        for text in (*row["keywords"], *row["aliases"]):
            tagged[normalised(text)].add(place)
    name_stems = [stems(name_document(row)) for row in rows]
    found = []
    for text in sorted(tagged, key=order):
        wanted = frozenset(place for place in tagged[text] if in_names or not stems(text) & name_stems[place])
        if text and wanted:
            found.append(Query(text, wanted, frozenset(tagged[text]) - wanted))
    return found[:limit]


def recall(scores_NQ: torch.Tensor, queries: Sequence[Query], top: int = TOP) -> float:
    """
    Returns the share of the wanted icons that are among the first results, a mean over queries.

    Args:
        scores_NQ: of each icon for each query, higher is better, minus infinity for icons that are no result. Equal
            ones stand in the icons' order.
        queries: Q of them, at least one.
        top: results that count.
    """
    shares = []
    for query, scores_N in zip(queries, scores_NQ.T, strict=True):
        scores_N = scores_N.clone()
        scores_N[list(query.left_out)] = -torch.inf
        results = scores_N.argsort(descending=True, stable=True)[:top].tolist()
        hits = sum(place in query.wanted and scores_N[place] > -torch.inf for place in results)
        shares.append(hits / len(query.wanted))
    return fmean(shares)


def chance(rows: int, queries: Sequence[Query], top: int = TOP) -> float:
    """Returns the recall of a random order of so many icons."""
    return fmean(min(1.0, top / (rows - len(query.left_out))) for query in queries)


def lexical_scores(documents: Sequence[str], queries: Sequence[Query]) -> torch.Tensor:
    """
    Scores documents by BM25 over their words, singular and plural alike.

    Args:
        documents: N texts, one for each icon, at least one of which has words.
        queries: Q of them.

    Returns:
        `[N, Q]`, minus infinity where a document has none of a query's words.

    Raises:
        ImportError: bm25s is not installed.
    """
    with needs_extra("the lexical search is one of a library", "dev"):
        import bm25s
    index = bm25s.BM25()
    index.index([_tokens(text) for text in documents], show_progress=False)
    scores_QN = torch.stack([torch.from_numpy(index.get_scores(_tokens(query.text))) for query in queries])
    return torch.where(scores_QN > 0, scores_QN.double(), -torch.inf).T


def _tokens(text: str) -> list[str]:
    return [stem for word in words(text) for stem in stems(word)]


def tags_by_name(columns: dict[str, list]) -> dict[str, list[str]]:
    """Returns all makers' tags of each name of the training icons."""
    found = defaultdict(dict)
    for name, tags in zip(columns["name"], columns["keywords"]):
        found[normalised(name)].update(dict.fromkeys(tags))
    return {name: list(tags) for name, tags in found.items()}


def name_document(row: dict) -> str:
    """Returns the words of an icon's file name and name."""
    return f"{row['icon']} {row['name']}"


def neighbour_document(neighbours: Sequence[dict]) -> str:
    """Returns names and tags of the training images nearest to an image, words of several as often as they come."""
    near = neighbours[:NEIGHBOURS]
    return " ".join(" ".join((row["name"], *row["keywords"])) for row in near)
