# SPDX-License-Identifier: Apache-2.0
"""How far generated captions are the right ones: exact match and overlap of words, each beside its floor."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from ..data.encoding import DocumentEncoder
from ..errors_moma import InputError
from .held_out import CaptionedImages
from .measures import write_captions


LEAST_NEW_TOKENS = 32
NUM_SAMPLES = 12


def normalise(text: str) -> str:
    """Return a text without regard to case, and with single spaces between its words."""
    return " ".join(text.casefold().split())


def word_overlap(text: str, reference: str) -> float:
    """Return the F1 of the words of two texts, counted as SQuAD measures answers, but with punctuation."""
    words, wanted = Counter(normalise(text).split()), Counter(normalise(reference).split())
    if not words or not wanted:
        return float(words == wanted)
    shared = (words & wanted).total()
    return 2 * shared / (words.total() + wanted.total())


def caption_scores(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the means over pairs of a text and its reference."""
    if len(texts) != len(references) or not texts:
        raise InputError(
            f"there are {len(texts)} texts and {len(references)} references: as many, and some, are needed."
        )
    pairs = list(zip(texts, references, strict=True))
    return {
        "exact_match": fmean(normalise(text) == normalise(reference) for text, reference in pairs),
        "overlap": fmean(word_overlap(text, reference) for text, reference in pairs),
    }


def measure_captions(model, processor, rows: CaptionedImages, batch_size: int, seed: int = 0) -> dict:
    """Caption images greedily, and compare the texts with their captions."""
    references = rows.captions
    encoder = DocumentEncoder(processor)
    # enough for the longest reference and its end
    max_new_tokens = max(LEAST_NEW_TOKENS, 1 + max(len(encoder.text_ids(text)) for text in references))
    texts = write_captions(model, processor, rows.codes, batch_size, max_new_tokens)
    floor = None
    if len(texts) > 1:
        floor = caption_scores(texts, [references[index] for index in derangement(len(texts), seed)])
    samples = [
        {"reference": reference, "generated": text} for reference, text in list(zip(references, texts))[:NUM_SAMPLES]
    ]
    return {
        "images": len(texts),
        "generated": caption_scores(texts, references),
        "floor": floor,
        "samples": samples,
    }


def derangement(length: int, seed: int = 0) -> list[int]:
    """Return a random permutation of one cycle, so that no index keeps its place; it follows from the seed alone."""
    if length < 2:
        raise InputError(f"`length` is {length}: one place alone cannot move.")
    cycle = np.random.default_rng(seed).permutation(length)
    order = np.empty(length, dtype=int)
    order[cycle] = np.roll(cycle, -1)
    return order.tolist()
