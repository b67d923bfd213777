# SPDX-License-Identifier: Apache-2.0
"""The parts of a card that scripts write, each between two comments that name it."""


def replace_block(card: str, text: str, name: str = "counts") -> str:
    """The card with what stands between `<!-- NAME: start -->` and `<!-- NAME: end -->` replaced."""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    before, found, rest = card.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the card needs the comments {start} and {end}, between which a script writes.")
    return f"{before}{start}\n{text}\n{end}{after}"
