# SPDX-License-Identifier: Apache-2.0
"""Names and tags with their probabilities, and means of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Guess:
    """A name or a tag of an image."""

    text: str
    probability: float


def mean_guesses(views: Sequence[dict[str, float]]) -> list[Guess]:
    """Return the texts of the views of an image with their mean probabilities, the likeliest first."""
    totals = defaultdict(float)
    for texts in views:
        for text, probability in texts.items():
            totals[text] += probability
    return _sorted({text: total / len(views) for text, total in totals.items()})


def mixed_guesses(
    written: Sequence[Sequence[Guess]], known: Sequence[dict[str, float]], share: float
) -> list[list[Guess]]:
    """Return guesses of a model and shares of a memory as one, the likeliest first."""
    found = []
    for guesses, shares in zip(written, known, strict=True):
        weight = share if shares else 0.0
        totals = defaultdict(float)
        for guess in guesses:
            totals[guess.text] += (1 - weight) * guess.probability
        for text, probability in shares.items():
            totals[text] += weight * probability
        found.append(_sorted({text: total for text, total in totals.items() if total > 0}))
    return found


def _sorted(shares: Mapping[str, float]) -> list[Guess]:
    return [Guess(text, share) for text, share in sorted(shares.items(), key=lambda entry: -entry[1])]
