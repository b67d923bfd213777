# SPDX-License-Identifier: Apache-2.0
"""Texts made of columns: `"label"` is a column, `"{style}: {label}"` a template of two."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, time, timedelta
from functools import cached_property
from numbers import Number
from string import Formatter
from typing import Any

import numpy as np

from ..errors_moma import InputError
from .images import SkippedRow


@dataclass(frozen=True)
class Template:
    """A text with places for the columns of a row."""

    text: str

    @cached_property
    def parts(self) -> list[tuple[str, str | None]]:
        """Pairs of a fixed text and the column after it, if any."""
        if "{" not in self.text:
            return [("", self.text)]
        try:
            parsed = list(Formatter().parse(self.text))
        except ValueError as error:
            raise InputError(f"template {self.text!r} cannot be read: {error}.") from error
        if any(name == "" or spec or conversion for _, name, spec, conversion in parsed):
            raise InputError(f"template {self.text!r}: braces hold names of columns and nothing else.")
        if all(name is None for _, name, _, _ in parsed):
            raise InputError(f"template {self.text!r} names no column: a column stands in single braces, {{label}}.")
        return [(fixed, name) for fixed, name, _, _ in parsed]

    @cached_property
    def columns(self) -> list[str]:
        """The columns, each once."""
        return list(dict.fromkeys(name for _, name in self.parts if name is not None))

    def empty_columns(self, row: Mapping[str, Any]) -> list[str]:
        """Return the columns that hold nothing in a row."""
        return [name for name in self.columns if not is_something(row[name])]

    def is_full(self, row: Mapping[str, Any]) -> bool:
        """Return whether every column holds something in a row."""
        return not self.empty_columns(row)

    def texts(self, row: Mapping[str, Any]) -> Iterator[str]:
        """Yield the text of a row, unless a column holds nothing, or what is no text."""
        with suppress(SkippedRow):
            if self.is_full(row):
                yield self.render(row)

    def render(self, row: Mapping[str, Any], rng: np.random.Generator | None = None) -> str:
        """Return the text of a row."""
        return "".join(fixed + ("" if name is None else as_text(name, row[name], rng)) for fixed, name in self.parts)


def is_something(value: Any) -> bool:
    """Return whether there is a text in a value: not in an empty one, in NaN, nor in a list of these."""
    if isinstance(value, (list, tuple)):
        return any(map(is_something, value))
    return not _is_nothing(value) and str(value).strip() != ""


def _is_nothing(value: Any) -> bool:
    # a cell of numbers that is empty may be NaN, which alone differs from itself
    return value is None or (isinstance(value, float) and value != value)


def as_text(name: str, value: Any, rng: np.random.Generator | None = None) -> str:
    """Return the text of a value, see [`Template.render`]."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        entries = list(value) if rng is None else [value[place] for place in rng.permutation(len(value))]
        return ", ".join(as_text(name, entry) for entry in entries if is_something(entry))
    if _is_nothing(value):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        # columns of whole numbers with an empty cell are read as fractions
        return str(int(value))
    if isinstance(value, (Number, date, time, timedelta)):
        return str(value)
    kind = type(value).__name__
    raise SkippedRow("text not readable", f"column {name!r} holds a {kind}; a text is made of texts, numbers or lists")
