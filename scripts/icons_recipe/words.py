# SPDX-License-Identifier: Apache-2.0
"""Words and pairs of words that no text of the train split may hold."""

from collections.abc import Collection, Iterable, Sequence

from icons_recipe.names import words


def stems(text: str) -> frozenset[str]:
    """Returns the words of a text, one form for singular and plural: `{"cloud", "arrow"}` for `"cloud arrows"`."""
    return frozenset(word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words(text))


class HeldOutWords:
    """Sets of words that must not stand together in one text: single words, and pairs."""

    def __init__(self, phrases: Iterable[str]):
        """
        Args:
            phrases: held-out words such as `"anvil"` and pairs such as `"cloud off"`.
        """
        self.phrases = tuple(phrases)
        self._by_word = {}
        for phrase in self.phrases:
            for word in stems(phrase):
                self._by_word.setdefault(word, []).append(stems(phrase))

    def found_in(self, text: str) -> bool:
        """Tells whether all words of any of the held-out phrases stand in a text."""
        found = stems(text)
        return any(phrase <= found for word in found for phrase in self._by_word.get(word, ()))

    def without(self, texts: Collection[str]) -> list[str]:
        """Returns those of the texts in which nothing held out stands."""
        return [text for text in texts if not self.found_in(text)]


def rows_by_word(names: Sequence[str]) -> dict[str, set[int]]:
    """Returns the rows in whose name each word (in the form of `stems`) stands."""
    index = {}
    for row, name in enumerate(names):
        for word in stems(name):
            index.setdefault(word, set()).add(row)
    return index
