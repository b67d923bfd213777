# SPDX-License-Identifier: Apache-2.0
"""Sources of a training: what a recipe calls them, where their rows are, and how `datasets` opens them."""

import csv
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from glob import escape, glob
from pathlib import Path
from typing import Annotated, Any

from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    LargeList,
    List,
    ReadInstruction,
    config,
    get_dataset_split_names,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import SPLIT_KEYWORDS
from datasets.fingerprint import Hasher
from pydantic import Field
from transformers.utils import logging

from ..errors_moma import InputError
from ..hub.names import not_found_message
from ..utils.fields import Float, read_field
from ..utils.messages import one_line
from ..utils.records import read_record
from .kinds import SourceKind, read_kind


logger = logging.get_logger(__name__)
TRAIN, VALIDATION = "train", "validation"
# how rows are drawn that become `validation`; what was begun by another draw does not go on under this one
HELD_OUT_RULE = "blake2b"
# names that the figures of a log have already
_NAMES_OF_A_LOG = ("text", "image", "audio")
# what a recipe says of any source, whatever its kind
COMMON_FIELDS = ("data", "load", "splits", "held_out", "weight", "root")
# readers of single files, by their ending
READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".tar": "webdataset",
}
# tables, and arguments of their reader by which somebody says what a row's fields are
TABLES = (".csv", ".tsv")
_OF_FIELDS = (
    *("index_col", "header", "names", "column_names", "usecols", "skiprows"),
    *("quotechar", "escapechar", "comment"),
)
# as `imagefolder` reads them
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# stands for the length of any split: parts in percent end where they do in one of any other length
_MANY_ROWS = 10**12


@dataclass(frozen=True)
class Source:
    """One source of a recipe.

    Args:
        name (`str`):
            the recipe's name for it.
        data (`str`):
            a folder, a file, a pattern of files, or a name on the Hub.
        kind (`SourceKind`):
            its columns.
        load (`dict[str, Any]`, *optional*, defaults to `{}`):
            further arguments of `datasets.load_dataset`, such as `name`, `revision` or `streaming`.
        splits (`dict[str, str]`, *optional*, defaults to `{}`):
            the data set's name of `train`, `validation` and others, where it differs.
        held_out (`float`, *optional*, defaults to `0.02`):
            share of the training rows that becomes `validation` where the data set has no such split.
        weight (`float`, *optional*, defaults to `1.0`):
            its part of the tokens of a mixture, relative to the other sources' weights.
        root (`str`, *optional*):
            folder that paths of images in the rows start from; by default that of `data`.
    """

    name: str
    data: str
    kind: SourceKind
    load: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    held_out: Annotated[Float, Field(ge=0, lt=1)] = 0.02
    weight: Annotated[Float, Field(ge=1e-6, le=1e6)] = 1.0
    root: str | None = None

    def split_names(self) -> dict[str, str]:
        """Return the data set's splits by the names that the training gives them: `train`, `validation` and others.

        Raises:
            ValueError: the data cannot be opened, or have no split to train on.
        """
        path, options = self._loading()
        found = self._call(get_dataset_split_names, path, options)
        names = {TRAIN: found[0]} if len(found) == 1 else {name: name for name in found}
        # a split that has another name here, or of which rows are trained on, is not read under its own as well
        renamed = {part for split in self.splits.values() for part in self._parts(split, found, whole=True)}
        renamed |= self._parts(self.splits[TRAIN], found) if TRAIN in self.splits else set()
        renamed -= self.splits.keys()
        names = {name: split for name, split in names.items() if name not in renamed} | self.splits
        for name, split in names.items():
            if not self._parts(split, found) <= set(found):
                raise InputError(
                    f"sources: {self.name!r}: {self.data!r} has no split {split!r} (for {name!r}), but {found}."
                )
        if TRAIN not in names:
            why = "which have other names here" if TRAIN in found else "none of which is called 'train'"
            raise InputError(
                f"sources: {self.name!r}: {self.data!r} has the splits {found}, {why}; name the one to train on, "
                "`splits: {train: ...}`."
            )
        refuse_shared_parts(f"sources: {self.name!r}: splits", names[TRAIN], names.get(VALIDATION))
        return names

    def _parts(self, split: str, found: list[str], whole: bool = False) -> set[str]:
        """Return the splits that one such as `"train[:10%]+test"` is made of, which `datasets` reads."""
        if split in found:
            return {split}
        try:
            return {part.split for part in split_parts(split) if not whole or part.unit is None}
        except InputError as error:
            raise InputError(f"sources: {self.name!r}: splits: {error}") from error

    def split_files(self) -> dict[str, frozenset[str]]:
        """Return the files of each of the data set's splits, as `datasets` finds them, links followed."""
        files = self._call(load_dataset_builder, *self._loading()).config.data_files or {}
        real = {}
        for split, found in files.items():
            # of those that name the others there may be one for all splits
            named = [file for file in found if Path(file).name not in METADATA] or found
            real[str(split)] = frozenset(file if "://" in file else str(Path(file).resolve()) for file in named)
        return real

    def open(self, split: str) -> Dataset | IterableDataset:
        """Open a split, of which no image is decoded yet where it is streamed.

        Args:
            split (`str`):
                the data set's own name of it.

        Raises:
            ValueError: the data cannot be opened, or lack a column of the source.
        """
        path, options = self._loading()
        if path == READERS[".csv"]:
            refuse_longer_rows(f"sources: {self.name!r}", table_files(options.get("data_files")), options)
        elif Path(path).resolve() == Path(self.data).resolve() and Path(path).is_dir():
            options = self._of_folder(path, options)
        rows = self._of_split(self._call(load_dataset, path, {**options, "split": split}), split)
        columns = rows.column_names or list(next(undecoded_rows(rows), {}))
        if self._list_of_sounds() is not None and "file_name" in columns:
            rows = rows.rename_column("file_name", "audio")
            columns = ["audio" if name == "file_name" else name for name in columns]
        missing = [name for name in self.kind.columns() if name not in columns]
        # a source of no rows has no columns, and is refused once it is read
        if missing and columns:
            raise InputError(f"sources: {self.name!r}: {self.data!r} has no column {missing[0]!r}, but {columns}.")
        return rows

    def _of_folder(self, path: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a folder: how its tables are read, and a cache that belongs to its files as they are.

        What `datasets` has prepared of a folder with a card it finds again by the card's patterns, whatever files
        match them since, in this folder or another of that name.
        """
        builder = self._call(load_dataset_builder, path, options)
        # by split, with when each file was changed
        files = {split: (list(found), found.origin_metadata) for split, found in builder.config.data_files.items()}
        # of tables alone
        if hasattr(builder.config, "sep"):
            options = {**self._reading(".csv"), **options}
            tables = table_files([escape(file) for found, _ in files.values() for file in found])
            refuse_longer_rows(f"sources: {self.name!r}", tables, {**options, "sep": builder.config.sep})
        if options.get("streaming"):
            return options
        folder = Path(options.get("cache_dir") or config.HF_DATASETS_CACHE)
        return {**options, "cache_dir": str(folder / f"{Path(path).name}-{Hasher.hash(files)}")}

    def _of_split(self, rows: Dataset | IterableDataset, split: str) -> Dataset | IterableDataset:
        """Return the rows of a split, where one file of captions is that of all splits."""
        folders = split_folders(Path(self.data)) if self._goes_by_folders() else {}
        if len(folders) < 2:
            return rows
        if not isinstance(rows, Dataset) or split not in folders:
            raise InputError(
                f"sources: {self.name!r}: {self.data!r} has one file of captions above {sorted(folders)}, of which "
                f"neither a part ({split!r}) nor a stream is read: put the captions of each split into its folder."
            )
        column = next((name for name, entry in rows.features.items() if isinstance(entry, Image)), None)
        return rows if column is None else rows_below(rows, folders[split], column)

    def image_root(self) -> str:
        """Return the folder that relative paths of images start from."""
        if self.root is not None:
            return self.root
        path = Path(self.data)
        return str(path if path.is_dir() else path.parent)

    def is_held_out(self, place: str) -> bool:
        """Return whether a training row is one of those that become `validation`, by where it stands."""
        # a checksum of numbers that follow one another is no random draw: rows that come in turn would lack a kind
        digest = hashlib.blake2b(f"{self.name}/{place}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") < self.held_out * 2**32

    def pattern(self) -> str:
        """Return the data as a pattern: what is there is itself, whatever letters its name has."""
        path = Path(self.data)
        return escape(str(path.absolute())) if path.exists() else self.data

    def fields(self) -> dict[str, Any]:
        """Return what [`read_sources`] reads."""
        common = {name: getattr(self, name) for name in COMMON_FIELDS}
        return {**{name: value for name, value in common.items() if value not in (None, {})}, **self.kind.fields()}

    def _goes_by_folders(self) -> bool:
        """Return whether the data are a folder, and nothing says which of its files are read."""
        return Path(self.data).is_dir() and not {"data_files", "data_dir"} & self.load.keys()

    def _list_of_sounds(self) -> Path | None:
        """Return the file of a folder of sounds that names them, if there is one.

        `datasets` reads such a folder with torchcodec alone, though nothing is decoded.
        """
        path = Path(self.data)
        if not self.kind.has_sounds or not self._goes_by_folders() or split_folders(path):
            return None
        return next((path / name for name in METADATA if (path / name).is_file()), None)

    def _loading(self) -> tuple[str, dict[str, Any]]:
        path = Path(self.data)
        if (sounds := self._list_of_sounds()) is not None:
            options = {**self._reading(sounds.suffix), **self.load, "data_files": escape(str(sounds))}
            return READERS[sounds.suffix], options
        if path.is_dir():
            if self._goes_by_folders() and (saved := saved_files(path)):
                return READERS[".arrow"], {**self.load, "data_files": saved}
            files = data_files(path) if self._goes_by_folders() else {}
            # `datasets` calls what it prepares by the folder's name, which "." has none of
            folder = self.data if path.name not in ("", "..") else str(path.resolve())
            return ("imagefolder", {**self.load, "data_files": files}) if files else (folder, dict(self.load))
        is_pattern = any(letter in self.data for letter in "*?[")
        is_local = is_pattern or path.is_file() or path.suffix in READERS
        if is_local and not is_pattern and not path.is_file():
            raise InputError(f"sources: {self.name!r}: there is no file {self.data!r}.")
        if not is_local:
            # a reader's own name, such as `parquet`, comes with its files
            has_files = {"data_files", "data_dir"} & self.load.keys()
            if not has_files and (problem := not_found_message(self.data, "dataset")) is not None:
                raise InputError(f"sources: {self.name!r}: {problem}.")
            return self.data, {**(self._reading(".csv") if self.data == READERS[".csv"] else {}), **self.load}
        if path.suffix not in READERS:
            raise InputError(
                f"sources: {self.name!r}: no reader is known for files that end in {path.suffix!r}, only for those in "
                f"{sorted(READERS)}; name one and the files, `data: parquet` and `load: {{data_files: ...}}`."
            )
        return READERS[path.suffix], {"data_files": self.pattern(), **self._reading(path.suffix), **self.load}

    def _reading(self, suffix: str) -> dict[str, Any]:
        """Return arguments of the reader of a file, by its ending."""
        if suffix == ".txt":
            # the mark that some editors put before a text is none of its characters
            return {"encoding": "utf-8-sig"}
        if suffix not in TABLES:
            return {}
        # a caption is what stands there: 007 is no 7, NA is a word
        texts = {"converters": dict.fromkeys(self.kind.columns(), str), "keep_default_na": False, "na_values": [""]}
        # quotes mean nothing in a table of tabs
        return {**texts, "sep": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else texts

    def _call(self, function: Any, path: str, options: dict[str, Any]) -> Any:
        if function is not load_dataset:
            options = {name: value for name, value in options.items() if name != "streaming"}
        try:
            return function(path, **options)
        # readers of files fail in any way
        except Exception as error:
            # that there was another error is all that some say
            reason = error.__cause__ or error
            raise InputError(
                f"sources: {self.name!r}: `datasets` cannot open {self.data!r} "
                f"({type(reason).__name__}: {one_line(reason, 300)})."
            ) from error


def placed_rows(rows: Dataset | IterableDataset) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield undecoded rows and where each stands, by which [`Source.is_held_out`] goes."""
    shards = rows.num_shards if isinstance(rows, IterableDataset) else 1
    for shard in range(shards):
        part = rows if shards == 1 else rows.shard(num_shards=shards, index=shard)
        for number, row in enumerate(undecoded_rows(part)):
            yield row_place(number, None if shards == 1 else shard), row


def row_place(number: int, shard: int | None) -> str:
    """Return where a row stands: its number, and in a stream of several files, which are read apart, its file's."""
    return str(number) if shard is None else f"{shard}/{number}"


def undecoded_rows(rows: Dataset | IterableDataset) -> Iterator[dict[str, Any]]:
    """Yield rows whose images and sounds are `{"bytes": ..., "path": ...}`, in whatever depth of lists they stand.

    Classes, such as the folders that images are sorted into, are their names.
    """
    streamed = rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows
    # nothing is decoded where nobody knows what it is
    if streamed.features is not None:
        # `decode(False)` would leave JSON as text, too
        streamed = streamed.cast(Features({name: _undecoded(entry) for name, entry in streamed.features.items()}))
    features = (streamed.features or {}).items()
    classes = {name: entry for name, entry in features if isinstance(getattr(entry, "feature", entry), ClassLabel)}
    number = 0
    try:
        for row in streamed:
            number += 1
            yield row | {name: _class_name(entry, row[name]) for name, entry in classes.items()}
    # readers of files fail in any way
    except Exception as error:
        raise InputError(
            f"sources: after {number:,} rows no more can be read; is a file damaged there? "
            f"({type(error).__name__}: {one_line(error, 300)})"
        ) from error


def _class_name(feature: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [_class_name(feature.feature, entry) for entry in value]
    # what has no class has None or -1
    return None if value is None or value < 0 else feature.names[value]


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, (Image, Audio)):
        return dataclasses.replace(feature, decode=False)
    if isinstance(feature, (List, LargeList)):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(entry) for name, entry in feature.items()}
    return feature


def read_sources(section: Any) -> list[Source]:
    """Return the sources of a recipe.

    Args:
        section (`Any`):
            its mapping `sources`, of a name to the fields of [`Source`] and of its kind.

    Raises:
        ValueError: it is no such mapping, or a field is unknown, missing or out of range.
    """
    if not isinstance(section, dict) or not section:
        raise InputError(f"sources: expected a mapping of names to sources, got {section!r}.")
    sources = []
    for name, fields in section.items():
        if not isinstance(fields, dict) or not isinstance(fields.get("data"), str):
            raise InputError(f"sources: {name!r} needs `data`, a folder, file or name on the Hub; it is {fields!r}.")
        if not str(name).replace("-", "_").isidentifier():
            raise InputError(f"sources: {name!r} becomes the name of a folder: letters, digits, '-' and '_' only.")
        if len(section) > 1 and name in _NAMES_OF_A_LOG:
            raise InputError(f"sources: {name!r} is a modality, too: a log could not tell whose losses are whose.")
        where = f"sources: {name!r}"
        common = {
            key: read_field(Source, key, value, f"{where}: {key}")
            for key, value in fields.items()
            if key in COMMON_FIELDS
        }
        for key, value in common.get("load", {}).items():
            # YAML makes one of a text, and neither a reader nor JSON takes it
            if isinstance(value, date):
                raise InputError(f"{where}: load: {key} = {value} is a date in YAML: put quotes around it.")
        own = {key: value for key, value in fields.items() if key not in COMMON_FIELDS}
        kind = read_kind(name, own, COMMON_FIELDS)
        sources.append(Source(name=str(name), kind=kind, **common))
    return sources


def source_texts(sources: Sequence[Source], rows: int) -> Iterator[str]:
    """Yield all texts of the training rows, which a text tokenizer learns from: every caption, those of a document.

    Rows that become `validation` are left out.
    """
    for source in sources:
        names = source.split_names()
        placed = placed_rows(source.open(names[TRAIN]))
        read = (row for place, row in placed if VALIDATION in names or not source.is_held_out(place))
        for row in itertools.islice(read, rows):
            yield from source.kind.row_texts(row)


def warn_of_shared_rows(sources: Sequence[Source], names: Mapping[str, Mapping[str, str]]) -> None:
    """Tell of sources that train on what another one holds out, in a split or by a draw of its own."""
    # one alone has no other, and its files need not be looked for
    files = {source.name: source.split_files() for source in sources if len(sources) > 1}
    for first, second in itertools.combinations(sources if files else (), 2):
        pair = [(entry, names[entry.name], files[entry.name]) for entry in (first, second)]
        if _trains_on_held_out(*pair) or _trains_on_held_out(*reversed(pair)):
            logger.warning(
                f"sources: {first.name!r} and {second.name!r} read the same files, {second.data!r}, and hold out "
                "other rows of them: what one is evaluated on the other is trained on. Give both the same parts, "
                "`splits: {train: 'train[:98%]', validation: 'train[98%:]'}`."
            )


_Reader = tuple[Source, Mapping[str, str], Mapping[str, frozenset[str]]]


def _trains_on_held_out(first: _Reader, second: _Reader) -> bool:
    """Return whether a source with its names and files of splits trains on rows that a second one holds out."""
    (_, names, files), (other, other_names, other_files) = first, second
    held_out = other_names.get(VALIDATION, other_names[TRAIN] if other.held_out > 0 else None)
    for own in split_parts(names[TRAIN]):
        for part in split_parts(held_out) if held_out is not None else ():
            mine, theirs = files.get(own.split), other_files.get(part.split)
            # rows are counted through all files, so that other files have other numbers
            if mine and theirs and (own.overlaps(part) if mine == theirs else mine & theirs):
                return True
    return False


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
