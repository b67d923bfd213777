# SPDX-License-Identifier: Apache-2.0
"""Folders of pictures that are sorted into splits under one `metadata.csv`, which `datasets` passes over."""

from pathlib import Path
from typing import Any

from datasets import Dataset, Image


METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# split -> folders that `datasets` takes for it
_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of a data set's splits, where one file of captions stands above all of them; else nothing."""
    if not any((folder / name).is_file() for name in METADATA):
        return {}
    pairs = [(split, folder / name) for split, names in _FOLDERS.items() for name in names]
    found = {split: path for split, path in pairs if path.is_dir()}
    has_own = any((path / name).is_file() for path in found.values() for name in METADATA)
    return {} if has_own else found


def data_files(folder: Path) -> dict[str, list[str]]:
    """What `imagefolder` reads for each split; it gives every row of the metadata to each, see [`rows_below`]."""
    metadata = [str(folder / name) for name in METADATA if (folder / name).is_file()]
    return {split: [f"{path}/**", *metadata] for split, path in split_folders(folder).items()}


def rows_below(rows: Dataset, folder: Path, column: str) -> Dataset:
    """The rows whose picture lies below a folder.

    Args:
        rows: of `imagefolder`.
        folder: of a split.
        column: of the pictures.
    """
    values: Any = rows.select_columns(column).cast_column(column, Image(decode=False))[column]
    below = folder.resolve()
    chosen = [row for row, value in enumerate(values) if Path(value["path"]).resolve().is_relative_to(below)]
    return rows.select(chosen)


__all__ = ["data_files", "rows_below", "split_folders"]
