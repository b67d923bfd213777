# SPDX-License-Identifier: Apache-2.0
"""Where a command may write, given the data that it reads."""

from collections.abc import Sequence
from pathlib import Path

from ..errors_moma import InputError
from .sources import Source


def refuse_output_in_data(output: str, sources: Sequence[Source]) -> None:
    """Raise `ValueError` where an output lies in a folder that a source reads all files of."""
    for source in sources:
        chosen = {"data_files", "data_dir"} & source.load.keys()
        folder = Path(source.data)
        if folder.is_dir() and not chosen and Path(output).resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"`--output` {output!r} lies in the data of source {source.name!r}, {source.data!r}: its files would "
                "be read as data. Give a folder outside, or put the data into one of their own."
            )
