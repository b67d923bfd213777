# SPDX-License-Identifier: Apache-2.0
"""Writes the splits, and the list of all images with their hashes."""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value

from icons_recipe.rows import Row
from icons_recipe.splits import SPLITS
from modeling_moma.utils.atomic_files import atomic_write


FEATURES = Features(
    {
        "image": Image(),
        "label": Value("string"),
        "style": Value("string"),
        "name": Value("string"),
        "colour": Value("string"),
        "aliases": List(Value("string")),
        "keywords": List(Value("string")),
        "categories": List(Value("string")),
        "set": Value("string"),
        "icon": Value("string"),
        "family": Value("string"),
        "license": Value("string"),
    }
)
# committed, so that the folder has a train split where the rest of it is not built
TRAIN_SAMPLE = "train-sample.parquet"
SAMPLE_ROWS = 256
HASH_LIST = "hashes.parquet"
_SHARD_ROWS = 60_000


def to_record(row: Row) -> dict:
    """Returns a row as the data set stores it."""
    return {
        "image": {"bytes": row.image, "path": None},
        "label": row.label,
        "style": row.full_style,
        "name": row.name,
        "colour": row.colour,
        "aliases": list(row.aliases),
        "keywords": list(row.keywords),
        "categories": list(row.categories),
        "set": row.set,
        "icon": row.icon,
        "family": row.family,
        "license": row.license,
    }


def write_splits(
    folder: Path, rows: dict[str, list[Row]], seed: int, on_done: Callable[[str], None] = lambda name: None
) -> dict[str, int]:
    """
    Writes a parquet file for each split and several for `train`, each whole or not at all, and removes older ones.

    Args:
        folder: the folder of the files.
        rows: the rows of each split; their order in the files is random.
        seed: decides that order.
        on_done: called with the name of each file written.

    Returns:
        Bytes of each split.
    """
    sizes = dict.fromkeys(SPLITS, 0)
    written = set()
    for split in SPLITS:
        for name, part in _shards(split, rows[split], seed):
            records = [to_record(row) for row in part]
            # of few sets a split may have no rows, of which `from_list` does not take the features
            columns = {column: [record[column] for record in records] for column in FEATURES}
            path = atomic_write(folder / name, Dataset.from_dict(columns, features=FEATURES).to_parquet)
            sizes[split] += path.stat().st_size
            written.add(name)
            on_done(name)
    # of an earlier build; other files are whoever's they are
    own = re.compile(rf"(?:{'|'.join(SPLITS)})-(?:sample|\d{{5}}-of-\d{{5}})\.parquet")
    for path in folder.glob("*.parquet"):
        if path.name not in written and own.fullmatch(path.name):
            path.unlink()
    return sizes


def _shards(split, rows, seed):
    """Yields name and rows of each of a split's files."""
    ordered = list(rows)
    random.Random(seed).shuffle(ordered)
    if split == "train":
        yield TRAIN_SAMPLE, ordered[:SAMPLE_ROWS]
        ordered = ordered[SAMPLE_ROWS:]
    count = max(1, -(-len(ordered) // _SHARD_ROWS))
    for shard in range(count):
        part = ordered[shard * _SHARD_ROWS : (shard + 1) * _SHARD_ROWS]
        yield f"{split}-{shard:05d}-of-{count:05d}.parquet", part


def write_hash_list(path: Path, rows: Sequence[Row], of_row: Sequence[str | None], groups: Sequence[int]) -> int:
    """
    Writes set, icon, name, family, split, group and the first 8 bytes of the hash of every image in a split.

    Args:
        path: the file.
        rows: all rows.
        of_row: the split of each row, or `None`.
        groups: the group of each row.

    Returns:
        Bytes of the file.
    """
    listed = [number for number, split in enumerate(of_row) if split is not None]
    numbers = {group: position for position, group in enumerate(dict.fromkeys(groups[number] for number in listed))}
    table = pa.table(
        {
            **{
                field: pa.array([getattr(rows[number], field) for number in listed])
                for field in ("set", "icon", "name", "family")
            },
            "split": pa.array([of_row[number] for number in listed]),
            "group": pa.array([numbers[groups[number]] for number in listed], pa.int32()),
            "hash": pa.array([short_hash(rows[number].hash) for number in listed], pa.int64()),
        }
    )
    plain = {"hash": "PLAIN", "group": "DELTA_BINARY_PACKED", "icon": "DELTA_BYTE_ARRAY"}

    def write(aside):
        dictionaries = [name for name in table.column_names if name not in plain]
        pq.write_table(
            table, aside, compression="zstd", compression_level=19, use_dictionary=dictionaries, column_encoding=plain
        )

    return atomic_write(path, write).stat().st_size


def short_hash(digest: str) -> int:
    """Returns the first 8 bytes of a hexadecimal hash as a signed number."""
    return int.from_bytes(bytes.fromhex(digest[:16]), signed=True)
