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


def between_markers(text: str, name: str, body: str) -> str:
    """
    Puts a body between the comments `<!-- name -->` and `<!-- /name -->` of a text, in the place of what is there.

    Args:
        text (`str`): Markdown.
        name (`str`): of the markers.
        body (`str`): Markdown.

    Raises:
        ValueError: the text does not have each marker once, in this order.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(
            f"`text` must have the line {start} and after it {end}, each once: put them where it shall be."
        )
    before, after = text.split(start)[0], text.split(end)[1]
    return f"{before}{start}\n{body.strip()}\n{end}{after}"
