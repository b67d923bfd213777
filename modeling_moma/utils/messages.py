# SPDX-License-Identifier: Apache-2.0
"""What people read: errors in one line, tables in Markdown, and no notices of libraries that are not used."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


# Transformers imports them, used or not: torchao and bitsandbytes tell of kernels that they could not load, torch of
# how torchao registers its types.
OPTIONAL_LIBRARIES = ("torchao", "bitsandbytes", "torch.utils._pytree")


@contextmanager
def without_import_notices() -> Iterator[None]:
    """Drop warnings that [`OPTIONAL_LIBRARIES`] log meanwhile. Their errors pass, and so does all that others say.

    Whoever uses one of them imports it before this package, or sees what it says when it is used.
    """
    levels = {name: logging.getLogger(name).level for name in OPTIONAL_LIBRARIES}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def one_line(error: object, most: int | None = None) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split())[:most]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
