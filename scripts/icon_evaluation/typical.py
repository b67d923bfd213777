# SPDX-License-Identifier: Apache-2.0
"""The typical icon of every name that several makers draw: that of which a model finds the name likeliest, in black.

Makers draw a thing in many ways, and few of them are easily told. A model that has seen all of them is trained on the
one that it tells best, again and again, as "Emu" (arXiv 2309.15807) is tuned on few but good images.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tqdm.auto import tqdm

from icon_evaluation.samples import in_order, order
from image_sets.emoji import RESOLUTION
from image_sets.groups import LIMIT
from image_sets.icon_images import encode, small_grey, unpaint
from image_sets.icon_names import spaced
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.measures import encode_images, image_batches
from modeling_moma.evaluation.retrieval import paired_log_probs


# makers who draw a thing, where it is clear what it looks like
LEAST_MAKERS = 3
# icons of a name that are compared, of as many makers
MOST_COMPARED = 8
# what a caption asks for them by, in the place of a style
STYLE = "typical"
FEATURES = Features({"image": ImageFeature(), **dict.fromkeys(("name", "set", "icon"), Value("string"))})
_AT_ONCE = 256


class Candidate(NamedTuple):
    """An icon that may be typical of its name; `row` is its place among the training icons."""

    name: str
    row: int
    colour: str | None
    set: str
    icon: str


def typical_caption(row: Mapping) -> str:
    """What a typical icon is asked for by, as `house (typical)`."""
    return f"{spaced(row['name'])} ({STYLE})"


def candidates(columns: Mapping[str, Sequence]) -> list[Candidate]:
    """
    The icons that are compared, of each name that several makers draw, name by name.

    Of each maker one icon is taken, and of many makers so many, both by a hash of set and icon. Icons in colours of
    their own are taken where no maker has one that can be painted.
    """
    painted, every = defaultdict(dict[str, int]), defaultdict(dict[str, int])
    for row in in_order(columns["set"], columns["icon"]):
        if not (name := spaced(columns["name"][row])):
            continue
        every[name].setdefault(columns["family"][row], row)
        if columns["colour"][row] is not None:
            painted[name].setdefault(columns["family"][row], row)
    found = []
    for name in sorted(every):
        by_maker = painted[name] or every[name]
        if len(by_maker) >= LEAST_MAKERS:
            found += [
                Candidate(name, row, *(columns[field][row] for field in ("colour", "set", "icon")))
                for row in list(by_maker.values())[:MOST_COMPARED]
            ]
    return found


def in_black(images: Iterable[Image.Image], colours: Sequence[str | None]) -> np.ndarray:
    """Icons without their paint, uint8 `[N, H, W, 3]`: those that have a colour of `COLOURS` in black."""
    pixels = (np.asarray(image.convert("RGB")) for image in images)
    return np.stack(
        [each if colour is None else unpaint(each, colour) for each, colour in zip(pixels, colours, strict=True)]
    )


def name_scores(model, processor, codes: torch.Tensor, names: Sequence[str], batch_size: int) -> torch.Tensor:
    """The log-likelihoods of names of images, each ended as in captions, in nats, `[N]`."""
    encoder = DocumentEncoder(processor)
    images = [encoder.opened(processor.image_ids(each)) for each in codes.tolist()]
    end = len(encoder.text_ids("x"))
    opened = encoder.text_ids("x (")[end : end + 1]
    with torch.inference_mode():
        return paired_log_probs(model, images, [[*encoder.text_ids(name), *opened] for name in names], batch_size)


def typical_icons(model, processor, train: Dataset, batch_size: int) -> Dataset:
    """`image` (in black, if it has no colours of its own), `name`, `set` and `icon`, in the order of hashes."""
    columns = train.select_columns(["name", "family", "colour", "set", "icon"]).to_dict()
    # in the order of the files, which are read once
    compared = sorted(candidates(columns), key=lambda candidate: candidate.row)
    if not compared:
        raise InputError(f"none of {len(train)} training icons has a name that {LEAST_MAKERS} makers draw.")
    best: dict[str, tuple[float, Candidate, np.ndarray]] = {}
    for start in tqdm(range(0, len(compared), _AT_ONCE), desc="icons of every name"):
        some = compared[start : start + _AT_ONCE]
        images = train.select([candidate.row for candidate in some])["image"][:]
        images = in_black(images, [candidate.colour for candidate in some])
        batches = (
            processor.image_processor(list(each), return_tensors="pt")["pixel_values"]
            for each in np.array_split(images, -(-len(images) // batch_size))
        )
        codes = encode_images(processor, batches)
        scores = name_scores(model, processor, codes, [candidate.name for candidate in some], batch_size).tolist()
        for score, candidate, pixels in zip(scores, some, images):
            if candidate.name not in best or score > best[candidate.name][0]:
                best[candidate.name] = (score, candidate, pixels)
    chosen = sorted(best.values(), key=lambda entry: order(STYLE, entry[1].set, entry[1].icon))
    rows = {name: [getattr(candidate, name) for _, candidate, _ in chosen] for name in ("name", "set", "icon")}
    files = [{"bytes": encode(pixels), "path": None} for *_, pixels in chosen]
    return Dataset.from_dict({"image": files, **rows}, features=FEATURES)


class KnownDrawings:
    """Tells drawings that are nearly one of the `typical_icons` that a model learnt from, again and again.

    They are compared as the data set compares icons, with what the image tokenizer keeps of the icons.
    """

    def __init__(self, icons: Dataset, processor, batch_size: int):
        self._names = np.asarray(icons["name"][:])
        codes = encode_images(processor, image_batches(icons, processor, batch_size, "typical icons"))
        self._greys_MG = _greys([image for some in codes.split(batch_size) for image in processor.decode_images(some)])

    def __len__(self) -> int:
        return len(self._greys_MG)

    def shares(self, images: Iterable[Image.Image], names: Sequence[str]) -> dict[str, float]:
        """The shares of images that are nearly an icon `of_their_name`, and nearly `any` icon."""
        greys_NG = _greys(images)
        is_near_NM = torch.cdist(greys_NG, self._greys_MG, p=1) < LIMIT * greys_NG.shape[1]
        is_named_NM = torch.from_numpy(np.asarray(list(map(spaced, names)))[:, None] == self._names[None, :])
        found = {"of_their_name": is_near_NM & is_named_NM, "any": is_near_NM}
        return {key: is_near.any(1).double().mean().item() for key, is_near in found.items()}


def _greys(images: Iterable[Image.Image]) -> torch.Tensor:
    """What near-identity is measured on, `[N, 256]`."""
    sized = (np.asarray(image.convert("RGB").resize((RESOLUTION, RESOLUTION))) for image in images)
    return torch.from_numpy(np.stack([small_grey(pixels) for pixels in sized])).float()
