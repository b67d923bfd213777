# SPDX-License-Identifier: Apache-2.0
"""The typical icon of every name that several makers draw: that of which a model finds the name likeliest, in black.

Makers draw a thing in many ways, and few of them are easily told. A model that has seen all of them is trained on the
one that it tells best, again and again, as "Emu" (arXiv 2309.15807) is tuned on few but good images.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tqdm.auto import tqdm

from icons_recipe.drawing import RESOLUTION, encode, small_grey, unpaint
from icons_recipe.near import LIMIT
from icons_recipe.samples import normalised, order
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.measures import encode_images, image_batches
from modeling_moma.evaluation.scoring import paired_log_probs


# makers who draw a thing, where it is clear what it looks like
LEAST_MAKERS = 3
# icons of a name that are compared, of as many makers
MOST_COMPARED = 8
# what a caption asks for them by, in the place of a style
STYLE = "typical"
FEATURES = Features({"image": ImageFeature(), **dict.fromkeys(("name", "set", "icon"), Value("string"))})
_AT_ONCE = 256


@dataclass(frozen=True)
class Candidate:
    """An icon that may be typical of its name.

    Args:
        name: its normalised name.
        row: its place among the training icons.
        colour: that it is painted in, of `COLOURS`; `None` where it has colours of its own.
        set: of icons that it is from.
        icon: its name there.
    """

    name: str
    row: int
    colour: str | None
    set: str
    icon: str


def typical_caption(row: Mapping) -> str:
    """Returns what a typical icon is asked for by, as `house (typical)`."""
    return f"{normalised(row['name'])} ({STYLE})"


def candidates(columns: Mapping[str, Sequence]) -> list[Candidate]:
    """
    Returns the icons that are compared, of each name that several makers draw, name by name.

    Of each maker one icon is taken, and of many makers so many, both by a hash of set and icon. Icons in colours of
    their own are taken where no maker has one that can be painted.

    Args:
        columns: `name`, `family`, `colour`, `set` and `icon` of all training icons.
    """
    ordered = sorted(range(len(columns["name"])), key=lambda row: order(columns["set"][row], columns["icon"][row]))
    painted, every = defaultdict(dict[str, int]), defaultdict(dict[str, int])
    for row in ordered:
        if not (name := normalised(columns["name"][row])):
            continue
        every[name].setdefault(columns["family"][row], row)
        if columns["colour"][row] is not None:
            painted[name].setdefault(columns["family"][row], row)
    found = []
    for name in sorted(every):
        by_maker = painted[name] or every[name]
        if len(by_maker) >= LEAST_MAKERS:
            rows = list(by_maker.values())[:MOST_COMPARED]
            found += [
                Candidate(name, row, columns["colour"][row], columns["set"][row], columns["icon"][row]) for row in rows
            ]
    return found


def in_black(images: Sequence[Image.Image], colours: Sequence[str | None]) -> np.ndarray:
    """Returns icons without their paint, uint8 `[N, H, W, 3]`: those that have a colour of `COLOURS` in black."""
    pixels = (np.asarray(image.convert("RGB")) for image in images)
    return np.stack(
        [each if colour is None else unpaint(each, colour) for each, colour in zip(pixels, colours, strict=True)]
    )


def name_scores(model, processor, codes: torch.Tensor, names: Sequence[str], batch_size: int) -> torch.Tensor:
    """
    Returns the log-likelihoods of names of images, each ended as in captions, in nats, `[N]`.

    Args:
        model: a `MomaForCausalLM` in eval mode.
        processor: its `MomaProcessor`.
        codes: of the images, `[N, image_seq_length]`.
        names: of each.
        batch_size: images at once.
    """
    encoder = DocumentEncoder(processor)
    images = [encoder.opened(processor.image_ids(each)) for each in codes.tolist()]
    end = len(encoder.text_ids("x"))
    opened = encoder.text_ids("x (")[end : end + 1]
    with torch.inference_mode():
        return paired_log_probs(model, images, [[*encoder.text_ids(name), *opened] for name in names], batch_size)


def most_typical(compared: Sequence[Candidate], scores: Sequence[float]) -> list[int]:
    """Returns the places of the candidates of the highest scores, one of each name."""
    best: dict[str, int] = {}
    for place, candidate in enumerate(compared):
        other = best.setdefault(candidate.name, place)
        if scores[place] > scores[other]:
            best[candidate.name] = place
    return list(best.values())


def typical_icons(model, processor, train: Dataset, batch_size: int) -> Dataset:
    """
    Returns the typical icons of all names that several makers draw, in the order of hashes.

    Args:
        model: a `MomaForCausalLM` in eval mode that writes names of icons.
        processor: its `MomaProcessor`.
        train: the training icons.
        batch_size: images at once.

    Returns:
        `image` (in black, if it has no colours of its own), `name`, `set` and `icon` of each.

    Raises:
        InputError: no name is that of so many makers.
    """
    columns = train.select_columns(["name", "family", "colour", "set", "icon"]).to_dict()
    # in the order of the files, which are read once
    compared = sorted(candidates(columns), key=lambda candidate: candidate.row)
    if not compared:
        raise InputError(f"none of {len(train)} training icons has a name that {LEAST_MAKERS} makers draw.")
    pixels, scores = [], []
    for start in tqdm(range(0, len(compared), _AT_ONCE), desc="icons of every name"):
        some = compared[start : start + _AT_ONCE]
        images = train.select([candidate.row for candidate in some])["image"][:]
        images = in_black(images, [candidate.colour for candidate in some])
        batches = (
            processor.image_processor(list(each), return_tensors="pt")["pixel_values"]
            for each in np.array_split(images, -(-len(images) // batch_size))
        )
        codes = encode_images(processor, batches)
        pixels.append(images)
        scores.append(name_scores(model, processor, codes, [candidate.name for candidate in some], batch_size))
    pixels, scores = np.concatenate(pixels), torch.cat(scores).tolist()
    places = sorted(
        most_typical(compared, scores), key=lambda place: order(STYLE, compared[place].set, compared[place].icon)
    )
    return as_data_set(pixels[places], [compared[place] for place in places])


def as_data_set(pixels_NHW3: np.ndarray, chosen: Sequence[Candidate]) -> Dataset:
    """Returns icons, uint8 `[N, H, W, 3]`, with their columns."""
    images = [{"bytes": encode(pixels), "path": None} for pixels in pixels_NHW3]
    columns = {name: [getattr(each, name) for each in chosen] for name in ("name", "set", "icon")}
    return Dataset.from_dict({"image": images, **columns}, features=FEATURES)


class KnownDrawings:
    """Tells drawings that are nearly one of the icons that a model learnt from, again and again.

    They are compared as `near_pairs` compares icons of the data set, with what the image tokenizer keeps of the icons.

    Args:
        icons: see `typical_icons`.
        processor: a `MomaProcessor`.
        batch_size: images at once.
    """

    def __init__(self, icons: Dataset, processor, batch_size: int):
        self._names = np.asarray(icons["name"][:])
        codes = encode_images(processor, image_batches(icons, processor, batch_size, "typical icons"))
        self._greys_MG = _greys([image for some in codes.split(batch_size) for image in processor.decode_images(some)])

    def __len__(self) -> int:
        return len(self._greys_MG)

    def shares(self, images: Iterable[Image.Image], names: Sequence[str]) -> dict[str, float]:
        """
        Returns the shares of images that are nearly an icon `of_their_name`, and nearly `any` icon.

        Args:
            images: N of them.
            names: of each.
        """
        greys_NG = _greys(images)
        is_near_NM = torch.cdist(greys_NG, self._greys_MG, p=1) < LIMIT * greys_NG.shape[1]
        is_named_NM = torch.from_numpy(np.asarray(list(map(normalised, names)))[:, None] == self._names[None, :])
        found = {"of_their_name": is_near_NM & is_named_NM, "any": is_near_NM}
        return {key: is_near.any(1).double().mean().item() for key, is_near in found.items()}


def _greys(images: Iterable[Image.Image]) -> torch.Tensor:
    """Returns what near-identity is measured on, `[N, 256]`."""
    sized = (np.asarray(image.convert("RGB").resize((RESOLUTION, RESOLUTION))) for image in images)
    return torch.from_numpy(np.stack([small_grey(pixels) for pixels in sized])).float()
