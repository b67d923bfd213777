# SPDX-License-Identifier: Apache-2.0
"""Cards of data sets and models, and the parts of them that scripts write, between two comments that name each."""

from pathlib import Path


DATA = Path(__file__).resolve().parent.parent / "data"


def read_card(folder: Path, name: str) -> str:
    """The text of the card in the folder of a data set; where there is none, of that in the repository."""
    card = folder / "README.md"
    return (card if card.exists() else DATA / name / "README.md").read_text(encoding="utf-8")


def replace_block(card: str, text: str, name: str = "counts") -> str:
    """The card with what stands between `<!-- NAME: start -->` and `<!-- NAME: end -->` replaced."""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    before, found, rest = card.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the card needs the comments {start} and {end}, between which a script writes.")
    return f"{before}{start}\n{text}\n{end}{after}"
