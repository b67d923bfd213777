# SPDX-License-Identifier: Apache-2.0
"""A sheet of held-out icons, what a model calls them, and what it draws from their captions."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from emoji_recipe.sheet import SheetEntry, draw_contact_sheet
from icons_recipe.samples import normalised, open_split, order, without_images
from modeling_moma.evaluation.measures import draw_images
from modeling_moma.evaluation.retrieval import likeliest_drawings
from modeling_moma.labelling.labeler import ImageLabeler


COLUMNS = 4


def rows_of_names(rows: Sequence[dict], count: int) -> list[int]:
    """Returns the places of icons of different names: the first names by their hashes, of each its first icon."""
    first = {}
    for place, row in enumerate(rows):
        first.setdefault(normalised(row["name"]), place)
    return [first[name] for name in sorted(first, key=order)[:count]]


def likeliest_of(model, processor, captions: Sequence[str], batch_size: int, sampling: dict, seeds: Sequence[int]):
    """
    Draws captions several times.

    Args:
        model: a `MomaForCausalLM` in eval mode.
        processor: its `MomaProcessor`.
        captions: N texts.
        batch_size: images at once.
        sampling: arguments of `generate`.
        seeds: a drawing of each caption for each.

    Returns:
        Codes of all drawings, `[N, seeds, image_seq_length]`, and of those of which the model finds the captions
        likeliest, `[N, image_seq_length]`.
    """
    drawn = [draw_images(model, processor, list(captions), batch_size, sampling, seed) for seed in seeds]
    drawn_NSL = torch.stack(drawn, dim=1)
    places_N = likeliest_drawings(model, processor, drawn_NSL, captions, batch_size)
    return drawn_NSL, drawn_NSL[torch.arange(len(captions)), places_N]


def draw_sheet(
    labeler: ImageLabeler,
    data: str,
    split: str,
    count: int,
    asked: Callable[[dict], str],
    sampling: dict,
    seeds: Sequence[int],
) -> Image.Image:
    """
    Draws icons chosen by the hash of their names: as they are, through the image tokenizer, and from their captions.

    Args:
        labeler: of the model.
        data: folder of the data set.
        split: one of its held-out splits.
        count: icons at most.
        asked: says of an icon's columns by what caption it is drawn.
        sampling: arguments of `generate`.
        seeds: a drawing of each caption for each, of which the likeliest is shown.

    Raises:
        InputError: there is no such folder or split.
    """
    opened = open_split(data, split)
    rows = without_images(opened)
    places = rows_of_names(rows, count)
    real = opened.select(places)["image"][:]
    codes = labeler.encode(real)
    captions = [asked(rows[place]) for place in places]
    processor, size = labeler.processor, labeler.batch_size
    _, drawn = likeliest_of(labeler.model, processor, captions, size, sampling, seeds)
    named = [guesses[0].text if guesses else "" for guesses in labeler.names(codes, 1)]
    shown = zip(real, processor.decode_images(codes), processor.decode_images(drawn), captions, named, strict=True)
    return draw_contact_sheet([SheetEntry(*entry) for entry in shown], COLUMNS)
