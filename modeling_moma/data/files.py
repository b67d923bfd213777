# SPDX-License-Identifier: Apache-2.0
"""Which files of a source are read and how, and which of their rows a split has."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, ReadInstruction, config
from datasets.data_files import SPLIT_KEYWORDS

from ..errors_moma import InputError
from ..utils.messages import one_line
from ..utils.records import read_record


TABLES = (".csv", ".tsv")
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
        return [file for file in found if Path(file).suffix in TABLES and Path(file).is_file()]
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


# as `imagefolder` reads them
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def split_folders(folder: Path) -> dict[str, list[Path]]:
    """Return the folders of a data set's splits, where one file of captions stands above all of them; else nothing."""
    if not any((folder / name).is_file() for name in METADATA):
        return {}
    named = {str(split): [folder / name for name in names] for split, names in SPLIT_KEYWORDS.items()}
    found = {split: [path for path in paths if path.is_dir()] for split, paths in named.items()}
    has_own = any((path / name).is_file() for paths in found.values() for path in paths for name in METADATA)
    return {} if has_own else {split: paths for split, paths in found.items() if paths}


def data_files(folder: Path) -> dict[str, list[str]]:
    """Return what `imagefolder` reads for each split; each gets every row of the metadata, see [`rows_below`]."""
    metadata = [escape(str(folder / name)) for name in METADATA if (folder / name).is_file()]
    return {
        split: [*(f"{escape(str(path))}/**" for path in paths), *metadata]
        for split, paths in split_folders(folder).items()
    }


def saved_files(folder: Path) -> dict[str, list[str]]:
    """Return the files of each split that `save_to_disk` of `datasets` has written into a folder; else nothing."""
    saved = folder / config.DATASETDICT_JSON_FILENAME
    folders = {name: folder / name for name in read_record(saved)["splits"]} if saved.is_file() else {"train": folder}
    states = {split: path / config.DATASET_STATE_JSON_FILENAME for split, path in folders.items()}
    # others beside them are caches of what was done with the rows
    return {
        split: [escape(str(path.with_name(file["filename"]))) for file in read_record(path)["_data_files"]]
        for split, path in states.items()
        if path.is_file()
    }


def rows_below(rows: Dataset, folders: Sequence[Path], column: str) -> Dataset:
    """Return the rows whose image lies below one of some folders, and those that name no image."""
    values: Any = rows.select_columns(column).cast_column(column, Image(decode=False))[column]
    below = [folder.resolve() for folder in folders]
    # a row without an image is of no split: whoever reads the rows tells of it
    paths = [None if value is None else Path(value["path"]).resolve() for value in values]
    return rows.select([row for row, path in enumerate(paths) if path is None or any(map(path.is_relative_to, below))])


# stands for the length of any split: parts in percent end where they do in one of any other length
_MANY_ROWS = 10**12


@dataclass(frozen=True)
class SplitPart:
    """Rows of one split that follow one another."""

    split: str
    unit: str | None
    rows: range

    def overlaps(self, other: "SplitPart") -> bool:
        """Return whether another part has some of the rows, as far as no length is needed to tell."""
        # where a row is in percent, the length alone says
        if {self.unit, other.unit} == {"%", "rows"}:
            return False
        return max(self.rows.start, other.rows.start) < min(self.rows.stop, other.rows.stop)


def split_parts(text: str) -> list[SplitPart]:
    """Return the parts that a text of `datasets` names."""
    parts = []
    for entry in map(str.strip, text.split("+")):
        split, bracket, bounds = entry.partition("[")
        unit = None if not bracket else "%" if "%" in bounds else "rows"
        try:
            (found,) = ReadInstruction.from_spec(entry).to_absolute({split: _MANY_ROWS})
        except (ValueError, AssertionError) as error:
            raise InputError(f"the split {text!r} cannot be read: {one_line(error)}.") from error
        parts.append(SplitPart(split, unit, range(found.from_, found.to)))
    return parts


def refuse_shared_parts(where: str, train: str, validation: str | None) -> None:
    """Raise `ValueError` where rows of `validation` are those of `train`, too."""
    try:
        trained_on, held_out = split_parts(train), [] if validation is None else split_parts(validation)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    for part in held_out:
        if any(part.split == own.split and part.overlaps(own) for own in trained_on):
            raise InputError(
                f"{where}: validation = {validation!r} has rows of train = {train!r}, which would be trained on and "
                f"held out; name two parts, `{{train: '{part.split}[:98%]', validation: '{part.split}[98%:]'}}`."
            )
