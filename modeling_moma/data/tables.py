# SPDX-License-Identifier: Apache-2.0
"""Tables in CSV: how `datasets` is to read them, and rows that have more fields than the header names."""

import csv
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from ..errors_moma import InputError


SUFFIXES = (".csv", ".tsv")
# arguments of a reader by which somebody says what a row's fields are
_OF_FIELDS = (
    *("index_col", "header", "names", "column_names", "usecols", "skiprows"),
    *("quotechar", "escapechar", "comment"),
)


def reading_options(suffix: str, columns: Sequence[str]) -> dict[str, Any]:
    """Return arguments of the reader of CSV by which a caption is what stands there: 007 is no 7, NA is a word."""
    texts = {"converters": dict.fromkeys(columns, str), "keep_default_na": False}
    # quotes mean nothing in a table of tabs
    tabs = {"sep": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
    return {**texts, "na_values": [""], **tabs}


def table_files(data_files: Any) -> list[str]:
    """Return the tables of this machine that the argument `data_files` of `datasets` names."""
    if isinstance(data_files, Mapping):
        return [file for entry in data_files.values() for file in table_files(entry)]
    if isinstance(data_files, str):
        found = sorted(glob(data_files, recursive=True))
        return [file for file in found if Path(file).suffix in SUFFIXES and Path(file).is_file()]
    return [file for entry in data_files or () for file in table_files(entry)]


def refuse_longer_rows(where: str, files: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a table whose first row has more fields than its header.

    The reader takes the first ones of each row for its name then, and reads all others as columns further to the
    left: an unquoted comma in a caption would give other captions.
    """
    separator = options.get("delimiter") or options.get("sep") or ","
    if any(options.get(name) is not None for name in _OF_FIELDS) or len(separator) != 1:
        return
    for file in files:
        header, row = _first_rows(file, separator, options.get("quoting") or csv.QUOTE_MINIMAL)
        if len(row) > len(header):
            raise InputError(
                f"{where}: the first row of {file!r} has {len(row)} fields, and its header names {len(header)}, so "
                f"that columns would be read as their neighbours. Put quotes around a text with {separator!r} in it; "
                "where rows begin with names of their own, `load: {index_col: 0}` says so, and where they end with a "
                "separator, `load: {index_col: false}`."
            )


def _first_rows(file: str, separator: str, quoting: int) -> tuple[list[str], list[str]]:
    """Return the header and the first row of a table, empty where there is none."""
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = filter(None, csv.reader(lines, delimiter=separator, quoting=quoting))  # pyright: ignore[reportArgumentType]
        try:
            return next(rows, []), next(rows, [])
        # a quote that does not end, which the reader tells of
        except csv.Error:
            return [], []
