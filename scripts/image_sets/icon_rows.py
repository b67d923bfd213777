# SPDX-License-Identifier: Apache-2.0
"""Puts images, names and tags of all sets together into rows, and writes them."""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value

from image_sets.icon_images import rendered_folder
from image_sets.icon_names import EMOJI_FAMILIES, match_emoji, read_emoji_names, read_names
from image_sets.icon_sets import MOST_TAGS, maker_family, package_of, pool_tags, read_set_files, read_tags
from modeling_moma.utils.atomic_files import atomic_write


SPLITS = ("train", "validation", "test", "test_family", "test_words", "test_pairs")
_TEXTS, _LISTS = ("label", "style", "name", "colour"), ("aliases", "keywords", "categories")
FEATURES = Features(
    {
        "image": Image(),
        **dict.fromkeys(_TEXTS, Value("string")),
        **dict.fromkeys(_LISTS, List(Value("string"))),
        **dict.fromkeys(("set", "icon", "family", "license"), Value("string")),
    }
)
# committed, so that the folder has a train split where the rest of it is not built
TRAIN_SAMPLE, SAMPLE_ROWS = "train-sample.parquet", 256
_SHARD_ROWS = 60_000


@dataclass(frozen=True, slots=True)
class Row:
    """
    One image with all that is said of it.

    `image` is a WebP file; `grey` and `stored_grey` are the 16x16 grey values of the drawing, in black, and of what
    the file holds of it.
    """

    set: str
    icon: str
    family: str
    name: str
    style: str
    aliases: tuple[str, ...]
    keywords: tuple[str, ...]
    categories: tuple[str, ...]
    colour: str | None
    license: str
    image: bytes
    grey: bytes
    stored_grey: bytes
    hash: str

    @property
    def cell(self) -> tuple[str, str]:
        """The (family, name) cell: images of one cell show the same thing by the same maker."""
        return self.family, self.name

    @property
    def label(self) -> str:
        """The name, with the colour before it where the image has one that is not black."""
        return self.name if self.colour in (None, "black") else f"{self.colour} {self.name}"

    @property
    def full_style(self) -> str:
        """Whose drawing it is, and in which style: `tabler, outline`."""
        maker = self.set.replace("-", " ")
        return f"{maker}, {self.style}" if self.style else maker


def read_rows(cache: Path, collections: dict[str, dict], emoji: dict) -> Iterator[Row]:
    """A row for each rendered icon, set by set, in order of names."""
    tags = read_tags(cache)
    pooled = pool_tags(tags)
    for prefix, document in read_set_files(cache, collections):
        icon_set = json.loads(document)
        rendered = pq.read_table(rendered_folder(cache) / f"{prefix}.parquet").to_pylist()
        slugs = [item["icon"] for item in rendered]
        aliases = _readable_aliases(icon_set)
        names = read_names(icon_set, [*slugs, *aliases])
        names |= read_emoji_names(icon_set, [*slugs, *aliases], emoji)
        synonyms, categories = _synonyms(names, aliases), _categories(icon_set)
        matched = match_emoji(icon_set, slugs, emoji) if prefix in EMOJI_FAMILIES else {}
        own = tags.get(package_of(prefix) or "", {})
        for item in rendered:
            slug = item["icon"]
            name = names[slug].name
            keywords = matched[slug].keywords if slug in matched else own.get(name) or pooled.get(name, ())
            yield Row(
                set=prefix,
                icon=slug,
                family=maker_family(prefix),
                name=name,
                style=names[slug].style,
                aliases=tuple(synonyms.get(slug, ())),
                keywords=tuple(keywords[:MOST_TAGS]),
                categories=tuple(categories.get(slug, ())),
                colour=item["colour"],
                license=collections[prefix]["license"]["spdx"],
                image=item["webp"],
                grey=item["grey"],
                stored_grey=item["stored_grey"],
                hash=item["hash"],
            )


def _readable_aliases(icon_set):
    """The icon behind each alias that neither turns nor mirrors it."""
    entries, found = icon_set.get("aliases", {}), {}
    for alias in entries:
        target, steps = alias, 0
        while target in entries and set(entries[target]) == {"parent"} and steps < len(entries):
            target, steps = entries[target]["parent"], steps + 1
        if target in icon_set["icons"]:
            found[alias] = target
    return found


def _synonyms(names, aliases):
    """The other names of each icon, without its own."""
    synonyms = {}
    for alias, slug in sorted(aliases.items()):
        if slug in names and names[alias].name != names[slug].name:
            synonyms.setdefault(slug, {})[names[alias].name] = None
    return synonyms


def _categories(icon_set):
    categories = {}
    for category, slugs in sorted(icon_set.get("categories", {}).items()):
        for slug in slugs if category.strip() else ():
            categories.setdefault(slug, []).append(category.strip().lower())
    return categories


def write_splits(folder: Path, rows: dict[str, list[Row]], seed: int = 0) -> dict[str, int]:
    """Writes a file for each split, several for `train`, in random order, removes older ones, and returns bytes."""
    sizes, written = dict.fromkeys(SPLITS, 0), set()
    for split in SPLITS:
        for name, part in _shards(split, rows[split], seed):
            # of few sets a split may have no rows, of which `from_list` does not take the features
            columns = {column: [_value(row, column) for row in part] for column in FEATURES}
            path = atomic_write(folder / name, Dataset.from_dict(columns, features=FEATURES).to_parquet)
            sizes[split] += path.stat().st_size
            written.add(name)
    # of an earlier build; other files are whoever's they are
    own = re.compile(rf"(?:{'|'.join(SPLITS)})-(?:sample|\d{{5}}-of-\d{{5}})\.parquet")
    for path in folder.glob("*.parquet"):
        if path.name not in written and own.fullmatch(path.name):
            path.unlink()
    return sizes


def _value(row, column):
    if column == "image":
        return {"bytes": row.image, "path": None}
    return getattr(row, "full_style" if column == "style" else column)


def _shards(split, rows, seed):
    """Name and rows of each of a split's files."""
    ordered = list(rows)
    random.Random(seed).shuffle(ordered)
    if split == "train":
        yield TRAIN_SAMPLE, ordered[:SAMPLE_ROWS]
        ordered = ordered[SAMPLE_ROWS:]
    count = max(1, -(-len(ordered) // _SHARD_ROWS))
    for shard in range(count):
        part = ordered[shard * _SHARD_ROWS : (shard + 1) * _SHARD_ROWS]
        yield f"{split}-{shard:05d}-of-{count:05d}.parquet", part


def write_hash_list(path: Path, rows: Sequence[Row], of_row: Sequence[str | None], groups: Sequence[int]) -> None:
    """Writes set, icon, name, family, split, group and the first 8 bytes of the hash of every image in a split."""
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
    dictionaries = [name for name in table.column_names if name not in plain]
    settings = {"compression": "zstd", "compression_level": 19, "use_dictionary": dictionaries}
    atomic_write(path, lambda aside: pq.write_table(table, aside, column_encoding=plain, **settings))


def short_hash(digest: str) -> int:
    """The first 8 bytes of a hexadecimal hash as a signed number."""
    return int.from_bytes(bytes.fromhex(digest[:16]), signed=True)
