# SPDX-License-Identifier: Apache-2.0
"""Which images show the same drawing, and a split that never puts one drawing on both sides."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from image_sets.components import linked_groups


DRAWING_FAMILIES = {
    "noto": "noto",
    "twemoji": "twemoji",
    "fluent 3d": "fluent",
    "fluent flat": "fluent",
    "fluent": "fluent",
    "noto v1": "noto v1",
    "emojione": "emojione",
    "fxemoji": "fxemoji",
}
STYLES = tuple(DRAWING_FAMILIES)
SPLITS = ("train", "validation", "test")

SKIN_TONE = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")


def drawing_family(style: str) -> str:
    """
    Names the family of styles that share one drawing: the three fluent styles are one family, every other style is
    its own.

    Args:
        style: one of `STYLES`, such as `"fluent flat"`.

    Returns:
        The family, such as `"fluent"`.
    """
    if style not in DRAWING_FAMILIES:
        raise ValueError(f"`style` is {style!r}, but the styles of this data set are {', '.join(STYLES)}.")
    return DRAWING_FAMILIES[style]


def base_label(label: str) -> str:
    """
    Removes the skin-tone part of a label: `"kiss: man, man, light skin tone"` becomes `"kiss: man, man"`, and
    `"waving hand: dark skin tone"` becomes `"waving hand"`. Labels without such a part come back as they are.
    """
    name, colon, rest = label.partition(": ")
    if not colon:
        return label
    details = [detail for detail in rest.split(", ") if not SKIN_TONE.fullmatch(detail)]
    # a couple of two tones spells out the persons that the plain label leaves unsaid
    if details == ["person", "person"] and SKIN_TONE.search(rest):
        return name
    return f"{name}: {', '.join(details)}" if details else name


def drawing_cell(label: str, style: str) -> tuple[str, str]:
    """Returns the (base label, drawing family) cell of an image: images of one cell show the same drawing."""
    return base_label(label), drawing_family(style)


def merge_cells(cells: Sequence[tuple[str, str]], images: Sequence[Hashable]) -> list[list[int]]:
    """
    Groups rows that must stay on one side of a split: rows of one cell, and rows of cells that contain the same
    image (the flag of Norway is also the flag of Bouvet Island).

    Args:
        cells: the (base label, drawing family) cell of each row.
        images: the identity of each row's image, such as a hash of its pixels. Same length as `cells`.

    Returns:
        Components of row numbers, each ascending, ordered by their first row.
    """
    if len(cells) != len(images):
        raise ValueError(f"`cells` has {len(cells)} rows and `images` has {len(images)}: they must be as long.")
    first, links = {}, []
    for row, (cell, image) in enumerate(zip(cells, images, strict=True)):
        links += [(first.setdefault(key, row), row) for key in (("cell", cell), ("image", image))]
    components = defaultdict(list)
    for row, group in enumerate(linked_groups(len(cells), links).tolist()):
        components[group].append(row)
    return list(components.values())


def split_cells(
    cells: Sequence[tuple[str, str]],
    images: Sequence[Hashable],
    shares: dict[str, float],
    seed: int = 0,
    max_cells: int = 4,
) -> list[str]:
    """
    Splits rows so that no drawing and no image stands on both sides, and so that every held-out base label keeps
    the drawing of another family in `train` (a model can know the word, but not this drawing of it).

    Args:
        cells: the (base label, drawing family) cell of each row.
        images: the identity of each row's image. Same length as `cells`.
        shares: share of all rows of each held-out split, such as `{"validation": 0.035}`.
        seed: the held-out components are drawn at random with this seed.
        max_cells: components of more cells stay in `train`, so that one cluster of look-alikes (families of equal
            silhouettes) does not make up a good part of a held-out split.

    Returns:
        The split of each row.
    """
    if sum(shares.values()) >= 1 or any(share < 0 for share in shares.values()):
        raise ValueError(f"`shares` is {shares}: shares must be at least 0 and leave a part for `train`.")
    components = merge_cells(cells, images)
    train_families = defaultdict(set)
    for label, family in cells:
        train_families[label].add(family)
    splits = ["train"] * len(cells)
    wanted = {split: share * len(cells) for split, share in shares.items()}
    held_out = Counter()
    random.Random(seed).shuffle(components)
    for rows in components:
        # the split that lacks most of its share comes first, so all of them draw from the same distribution
        split = min(wanted, key=lambda name: held_out[name] / max(wanted[name], 1e-9), default=None)
        if split is None or held_out[split] >= wanted[split]:
            break
        members = {cells[row] for row in rows}
        if len(members) > max_cells:
            continue
        taken = defaultdict(set)
        for label, family in members:
            taken[label].add(family)
        if any(not train_families[label] - families for label, families in taken.items()):
            continue
        for label, families in taken.items():
            train_families[label] -= families
        for row in rows:
            splits[row] = split
        held_out[split] += len(rows)
    return splits
