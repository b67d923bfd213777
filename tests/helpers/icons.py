# SPDX-License-Identifier: Apache-2.0
"""Icons of no sense with the columns of `data/icons`."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from helpers.tiny import noise_images


NAMES = ["house", "red apple", "castle", "cloud off", "key"]
TEXT = Value("string")
FEATURES = Features(
    image=ImageFeature(),
    **dict.fromkeys(("label", "style", "name", "colour", "set", "icon", "family", "license"), TEXT),
    **{name: List(TEXT) for name in ("aliases", "keywords", "categories")},
)


def icon(number: int, **fields) -> dict:
    """Columns of the icon of a number, but for its image."""
    name = NAMES[number % len(NAMES)]
    return {
        "style": "tabler, filled",
        "name": name,
        "label": name,
        "colour": "red" if number % 2 else None,
        "aliases": ["home"] if name == "house" else [],
        "keywords": ["building", "fruit"][: 1 + number % 2] if number % 3 else [],
        "categories": [],
        "set": f"set{number % 4}",
        "icon": f"{name.replace(' ', '-')}-{number}",
        "family": f"family{number % 4}",
        "license": "MIT",
        **fields,
    }


def write_icons(folder: Path, splits: Sequence[str], count: int = 12, **fields):
    """A data set with so many icons in each split, all of them with these fields."""
    (folder / "data").mkdir()
    images = noise_images(count * len(splits))
    for split in splits:
        rows = [{**icon(number, **fields), "image": images.pop()} for number in range(count)]
        columns = {name: [row[name] for row in rows] for name in FEATURES}
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(columns, features=FEATURES).to_parquet(path)
