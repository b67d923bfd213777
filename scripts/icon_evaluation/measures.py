# SPDX-License-Identifier: Apache-2.0
"""How many names and tags of held-out icons are right, what a search finds, and what a judge sees in drawings."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from icon_evaluation.samples import Sample, TrainIcons, order
from image_sets.icon_names import spaced, stems, words
from modeling_moma.errors_moma import InputError
from modeling_moma.utils.errors import needs_extra


# names and tags of an icon that count, and results of a search that somebody looks at
NAMES, TAGS, RESULTS = 5, 8, 10
# neighbours whose words stand for an image
NEIGHBOURS = 10
# the judge knows the most frequent names of the training icons
KNOWN_NAMES = 500
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 10, 256, 1e-3, 1e-2


def name_figures(found: Sequence[Sequence[str]], rows: Sequence[dict]) -> dict[str, float]:
    """
    Counts names that are right, compared in lower case and without signs, as shares of the icons.

    `found` are the names that each icon is given, the likeliest first; `rows` have `name`.
    `word_in_common`: the first one has one of the name's words (singular or plural).
    """
    guesses = [[spaced(text) for text in texts[:NAMES]] for texts in found]
    names = [spaced(row["name"]) for row in rows]
    pairs = list(zip(guesses, names, strict=True))
    return {
        "top1": fmean(name in texts[:1] for texts, name in pairs),
        "top5": fmean(name in texts for texts, name in pairs),
        "word_in_common": fmean(bool(stems(" ".join(texts[:1])) & stems(name)) for texts, name in pairs),
    }


def tag_figures(found: Sequence[Sequence[str]], rows: Sequence[dict]) -> dict[str, float]:
    """The mean shares of an icon's `keywords`, and of the first `TAGS` that it is given, that are found."""
    hits = []
    for texts, row in zip(found, rows, strict=True):
        wanted = {spaced(tag) for tag in row["keywords"]}
        number = len(wanted & {spaced(text) for text in texts[:TAGS]})
        hits.append((number / len(wanted), number / TAGS))
    return {"recall": fmean(recall for recall, _ in hits), "precision": fmean(precision for _, precision in hits)}


@dataclass(frozen=True)
class Query:
    """A tag or an alias to look for, icons that have it, and others that have it and count neither way."""

    text: str
    wanted: frozenset[int]
    left_out: frozenset[int]


def queries_of(rows: Sequence[dict], limit: int) -> list[Query]:
    """
    Tags and aliases of icons, chosen by hash.

    Wanted are icons in whose file name and name none of the query's words stands; others that have it are left out.
    """
    tagged = defaultdict(set)
    for place, row in enumerate(rows):
        for text in (*row["keywords"], *row["aliases"]):
            tagged[spaced(text)].add(place)
    name_stems = [stems(name_document(row)) for row in rows]
    found = []
    for text in sorted(tagged, key=order):
        wanted = frozenset(place for place in tagged[text] if not stems(text) & name_stems[place])
        if text and wanted:
            found.append(Query(text, wanted, frozenset(tagged[text]) - wanted))
    return found[:limit]


def recall(scores_NQ: torch.Tensor, queries: Sequence[Query], top: int = RESULTS) -> float:
    """The mean share of the wanted icons among the first results; minus infinity scores what is no result."""
    shares = []
    for query, scores_N in zip(queries, scores_NQ.T, strict=True):
        scores_N = scores_N.clone()
        scores_N[list(query.left_out)] = -torch.inf
        results = scores_N.argsort(descending=True, stable=True)[:top].tolist()
        hits = sum(place in query.wanted and scores_N[place] > -torch.inf for place in results)
        shares.append(hits / len(query.wanted))
    return fmean(shares)


def chance(rows: int, queries: Sequence[Query], top: int = RESULTS) -> float:
    """The recall of a random order of so many icons."""
    return fmean(min(1.0, top / (rows - len(query.left_out))) for query in queries)


def lexical_scores(documents: Sequence[str], queries: Sequence[Query]) -> torch.Tensor:
    """Scores of texts `[N, Q]` by BM25 over their words, singular and plural alike; minus infinity without a word."""
    with needs_extra("the lexical search is one of a library", "dev"):
        import bm25s

    def tokens(text: str) -> list[str]:
        return [stem for word in words(text) for stem in stems(word)]

    index = bm25s.BM25()
    index.index([tokens(text) for text in documents], show_progress=False)
    scores_QN = torch.stack([torch.from_numpy(index.get_scores(tokens(query.text))) for query in queries])
    return torch.where(scores_QN > 0, scores_QN.double(), -torch.inf).T


def tags_by_name(columns: dict[str, list]) -> dict[str, list[str]]:
    """All makers' tags of each name of the training icons."""
    found = defaultdict(dict)
    for name, tags in zip(columns["name"], columns["keywords"]):
        found[spaced(name)].update(dict.fromkeys(tags))
    return {name: list(tags) for name, tags in found.items()}


def name_document(row: dict) -> str:
    """The words of an icon's file name and name."""
    return f"{row['icon']} {row['name']}"


def neighbour_document(neighbours: Sequence[dict]) -> str:
    """Names and tags of the training images nearest to an image, words of several as often as they come."""
    return " ".join(" ".join((row["name"], *row["keywords"])) for row in neighbours[:NEIGHBOURS])


@dataclass(frozen=True)
class LinearJudge:
    """Multinomial logistic regression from standardised features of an image to its name."""

    names: list[str]
    mean: torch.Tensor
    std: torch.Tensor
    linear: nn.Linear
    train_images: int

    @torch.inference_mode()
    def figures(self, features: torch.Tensor, wanted: Sequence[str]) -> dict[str, float]:
        """The shares of images whose name the judge finds likeliest, and among its first five."""
        place = {name: number for number, name in enumerate(self.names)}
        own_N1 = torch.tensor([[place[name]] for name in wanted])
        logits_NC = self.linear((features.float() - self.mean) / self.std)
        found_N5 = logits_NC.topk(min(5, len(self.names)), dim=1).indices
        is_right_N5 = found_N5 == own_N1
        return {"top1": is_right_N5[:, 0].double().mean().item(), "top5": is_right_N5.any(1).double().mean().item()}


def fit_judge(train: TrainIcons, seed: int = 0, num_names: int = KNOWN_NAMES) -> LinearJudge:
    """Fits the judge to the training images of the most frequent names whose features are known."""
    names = [name for name, _ in Counter(map(spaced, train.columns["name"])).most_common(num_names)]
    place = {name: number for number, name in enumerate(names)}
    label_F = np.asarray([place.get(spaced(train.columns["name"][row]), -1) for row in train.rows.tolist()])
    known = np.flatnonzero(label_F >= 0)
    if len(np.unique(label_F[known])) < 2:
        raise InputError(
            f"the judge has {len(known)} training images of its {len(names)} names, too few to tell names apart; "
            "more --train-images give it others."
        )
    label_M, features_MD = torch.from_numpy(label_F[known]), torch.from_numpy(np.array(train.features[known])).float()
    mean, std = features_MD.mean(dim=0), features_MD.std(dim=0).clamp(min=1e-3)
    features_MD = (features_MD - mean) / std
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(features_MD.shape[1], len(names))
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, EPOCHS * -(-len(known) // BATCH))
    for _ in tqdm(range(EPOCHS), desc="judge"):
        for batch in torch.randperm(len(known), generator=generator).split(BATCH):
            loss = F.cross_entropy(linear(features_MD[batch]), label_M[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return LinearJudge(names, mean, std, linear.requires_grad_(False), len(known))


def means(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure."""
    return {name: fmean(entry[name] for entry in figures) for name in figures[0]}


def judged(
    judge: LinearJudge,
    seen: Callable[[torch.Tensor], torch.Tensor],
    sample: Sample,
    drawn_NSL: torch.Tensor,
    likeliest_NL: torch.Tensor,
    others: Sequence[int],
) -> dict:
    """
    What the judge sees in held-out icons, their reconstructions and drawings of their captions.

    Args:
        judge: knows the names of all icons.
        seen: codes of images to features of what they decode to.
        sample: the icons.
        drawn_NSL: codes of several drawings of each.
        likeliest_NL: codes of one of these.
        others: of each icon another one, by whose name its drawing is judged, too.
    """
    names = [spaced(row["name"]) for row in sample.rows]
    drawn = [seen(codes) for codes in drawn_NSL.unbind(1)]
    by_seed = [judge.figures(features, names) for features in drawn]
    return {
        "captions": len(names),
        "names": len(judge.names),
        "train_images": judge.train_images,
        "originals": judge.figures(sample.features, names),
        "reconstructions": judge.figures(seen(sample.codes), names),
        "drawn": means(by_seed),
        "likeliest": judge.figures(seen(likeliest_NL), names),
        "shuffled": means([judge.figures(features, [names[place] for place in others]) for features in drawn]),
        "by_seed": [figures["top1"] for figures in by_seed],
    }
