# SPDX-License-Identifier: Apache-2.0
"""How many names and tags of held-out icons are found, whoever has found them."""

from collections.abc import Sequence
from statistics import fmean

import torch

from icons_recipe.samples import Sample, normalised
from icons_recipe.words import stems
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.evaluation.retrieval import rank_figures, ranks
from modeling_moma.evaluation.scoring import continuation_log_probs


# names and tags of an icon that count
NAMES, TAGS = 5, 8


def name_figures(found: Sequence[Sequence[str]], rows: Sequence[dict]) -> dict[str, float]:
    """
    Counts names that are right, compared in lower case and without signs.

    Args:
        found: the names that each icon is given, the likeliest first.
        rows: `name` and `aliases` of each icon. Same length, at least one.

    Returns:
        Shares of the icons in [0, 1]: `top1` and `top5`, the name is the first one, or one of the first five;
        `top1_or_alias` and `top5_or_alias`, it or one of the aliases; `word_in_common`, the first one has one of the
        name's words (singular or plural).
    """
    guesses = [[normalised(text) for text in texts[:NAMES]] for texts in found]
    names = [normalised(row["name"]) for row in rows]
    right = [{name, *map(normalised, row["aliases"])} for name, row in zip(names, rows)]
    pairs = list(zip(guesses, names, right, strict=True))
    return {
        "top1": fmean(name in texts[:1] for texts, name, _ in pairs),
        "top5": fmean(name in texts for texts, name, _ in pairs),
        "top1_or_alias": fmean(not accepted.isdisjoint(texts[:1]) for texts, _, accepted in pairs),
        "top5_or_alias": fmean(not accepted.isdisjoint(texts) for texts, _, accepted in pairs),
        "word_in_common": fmean(bool(stems(" ".join(texts[:1])) & stems(name)) for texts, name, _ in pairs),
    }


def tag_figures(found: Sequence[Sequence[str]], rows: Sequence[dict]) -> dict[str, float]:
    """
    Counts the makers' tags that are found.

    Args:
        found: the tags that each icon is given, of which the first `TAGS` count.
        rows: `keywords` of each icon, at least one each. Same length, at least one.

    Returns:
        Means over the icons in [0, 1]: `recall`, the share of an icon's tags that are found; `precision`, the share
        of `TAGS` that are tags of the icon.
    """
    hits = []
    for texts, row in zip(found, rows, strict=True):
        wanted = {normalised(tag) for tag in row["keywords"]}
        number = len(wanted & {normalised(text) for text in texts[:TAGS]})
        hits.append((number / len(wanted), number / TAGS))
    return {"recall": fmean(recall for recall, _ in hits), "precision": fmean(precision for _, precision in hits)}


def rank_names(model, processor, sample: Sample, limit: int, name_end: str, batch_size: int) -> dict:
    """
    Ranks all names of a split for some of its icons, by the likelihood of a caption that begins with them.

    Args:
        model: a `MomaForCausalLM` in eval mode.
        processor: its `MomaProcessor`.
        sample: the icons, with all names of their split.
        limit: icons at most, the first of the sample.
        name_end: what follows a name in a caption, as `" ("`.
        batch_size: names at once.

    Returns:
        `images`, `names` (their numbers), and the figures of `rank_figures`.
    """
    encoder = DocumentEncoder(processor)
    shown = [encoder.opened(processor.image_ids(codes)) for codes in sample.codes[:limit].tolist()]
    texts = [encoder.text_ids(name + name_end) for name in sample.names]
    scores = continuation_log_probs(model, shown, texts, batch_size, f"names of {sample.split}, ranked")
    own = torch.tensor([sample.names.index(normalised(row["name"])) for row in sample.rows[:limit]])
    figures = rank_figures(*ranks(scores, torch.arange(len(shown)), own))
    return {"images": len(shown), "names": len(texts), **figures}
