# SPDX-License-Identifier: Apache-2.0
"""Folders whose files say which of them are read: a `metadata.csv` of images, and what `save_to_disk` writes."""

from collections.abc import Collection, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, config
from datasets.data_files import SPLIT_KEYWORDS
from PIL.Image import registered_extensions
from transformers.utils import logging

from ..utils.records import read_record


logger = logging.get_logger(__name__)
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


def warn_of_unnamed(name: str, rows: Dataset, files: Collection[str]) -> None:
    """Tell of images of a folder that no row of its file of captions names: `imagefolder` passes over them."""
    images = sorted(file for file in files if Path(file).suffix.lower() in registered_extensions())
    column = next((name for name, entry in rows.features.items() if isinstance(entry, Image)), None)
    if column is None or not images:
        return
    values: Any = rows.select_columns(column).cast_column(column, Image(decode=False))[column]
    named = {str(Path(value["path"]).resolve()) for value in values if value is not None}
    if unnamed := [image for image in images if image not in named]:
        logger.warning(
            f"sources: {name!r}: {len(unnamed)} of {len(images)} images are left out, since no row of the file of "
            f"captions names them; the first: {unnamed[0]!r}."
        )
