# SPDX-License-Identifier: Apache-2.0
"""The part of a data set card that its builder writes."""

START, END = "<!-- counts: start -->", "<!-- counts: end -->"


def replace_counts(card: str, counts: str) -> str:
    """Returns the card with what stands between its two `counts` comments replaced."""
    before, start, rest = card.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"`card` needs the comments {START} and {END}, between which the counts are written.")
    return f"{before}{START}\n{counts}\n{END}{after}"
