# SPDX-License-Identifier: Apache-2.0
"""The images of a recipe's sources, one by one and undecoded: those to train on and those held out."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.kinds import ImageKind
from ..data.sources import HELD_OUT_RULE, TRAIN, VALIDATION, Source, placed_rows, row_place
from ..errors_moma import InputError
from .recipe import read_recipe


RECIPES = (".yaml", ".yml")
# a recipe in JSON has no more bytes: data in JSON may have any number
JSON_RECIPE_BYTES = 1 << 20
# the column of a data set that stands in for a recipe
IMAGE_COLUMN = "image"
# fields of a source that change no image
OF_TEXTS = ("weight", "text", "alternatives", "image_first", "without_caption", "codings")


@dataclass(frozen=True)
class Candidate:
    """An image before it is decoded."""

    source: Source
    split: str
    row: int
    index: int
    is_held_out: bool
    value: Any

    def place(self) -> str:
        """Return where it stands, for errors and reports."""
        return f"source {self.source.name!r}, split {self.split!r}, row {self.row}, image {self.index}"


def read_image_sources(place: str, changes: Sequence[str] = ()) -> tuple[list[Source], dict[str, Any]]:
    """Return the sources with images that a recipe names, and its settings of the image tokenizer."""
    if not _is_recipe(Path(place)):
        settings = read_recipe(None, (), changes, ("image_tokenizer",)).image_tokenizer
        return [Source(name="images", data=place, kind=ImageKind(IMAGE_COLUMN))], settings
    recipe = read_recipe(place, (), changes, ("image_tokenizer", "processor", "sources"))
    sources = [source for source in recipe.sources if source.kind.has_images]
    if not sources:
        kinds = {source.name: source.kind.name for source in recipe.sources}
        raise InputError(
            f"{place!r} has no source with images, but {kinds or 'no sources at all'}: an image tokenizer is "
            "trained on sources of captions (`image`) or of interleaved documents (`segments`, `images`)."
        )
    of_processor = {"do_pad": True} if recipe.processor.do_pad else {}
    return sources, of_processor | recipe.image_tokenizer


def _is_recipe(path: Path) -> bool:
    """Return whether a file is a recipe, and not rows of data."""
    if path.suffix != ".json":
        return path.suffix in RECIPES
    if not path.is_file() or path.stat().st_size > JSON_RECIPE_BYTES:
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # lines of JSON, or nothing that can be read
    except ValueError:
        return False
    return isinstance(content, dict) and isinstance(content.get("sources"), dict)


def image_fields(source: Source) -> dict[str, Any]:
    """Return what decides on which images a source gives, for a comparison with those of an earlier start."""
    fields = {"name": source.name, "kind": source.kind.name, **source.fields()}
    # by which rows are held out
    if source.held_out:
        fields["held_out_rule"] = HELD_OUT_RULE
    if source.load.get("streaming"):
        fields["places"] = row_place(0, 0)
    return {name: value for name, value in fields.items() if name not in OF_TEXTS}


def candidates(source: Source) -> Iterator[Candidate]:
    """Yield a source's images in their order, first those of its split `train`.

    Held out are those of its split `validation` or, where it has none, of the rows that [`Source.is_held_out`] names.
    """
    names = source.split_names()
    for name in (TRAIN, VALIDATION):
        if name not in names:
            continue
        rows = source.open(names[name])
        for row, (place, columns) in enumerate(placed_rows(rows)):
            is_held_out = name == VALIDATION or (VALIDATION not in names and source.is_held_out(place))
            for index, value in enumerate(source.kind.row_images(columns)):
                yield Candidate(source, names[name], row, index, is_held_out, value)
