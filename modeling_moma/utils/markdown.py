# SPDX-License-Identifier: Apache-2.0
"""Numbers as text: Markdown tables, and means of several runs."""

from collections.abc import Sequence
from statistics import fmean, stdev


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float]) -> dict:
    """`mean` and `std` of several runs; the sample's standard deviation, `None` for a single run."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None}


def with_spread(part: dict, digits: int = 4, scale: float = 1.0, unit: str = "") -> str:
    """`"1.2340 ± 0.0010"` of [`spread`]'s result."""
    text = f"{scale * part['mean']:.{digits}f}"
    if part["std"] is not None:
        text += f" ± {scale * part['std']:.{digits}f}"
    return text + unit
