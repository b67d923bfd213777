# SPDX-License-Identifier: Apache-2.0
"""What a caption tells the model of its image, and an image of its caption: by how many nats either is likelier.

Were the model's two directions parts of one distribution, both numbers would be the same mutual information. A model
that draws what it is asked for takes as much from a caption as it takes from an image when it names it.

Shape suffixes:
    N pairs, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch

from ..data.encoding import DocumentEncoder
from ..errors_moma import InputError
from .held_out import CaptionedImages
from .scoring import paired_log_probs


def check_information(source: str, captions: Sequence[str]) -> None:
    """Raise `ValueError` where a source has too few captions with words."""
    number = sum(bool(text.strip()) for text in captions)
    if number < 2:
        raise InputError(f"information: the source {source!r} has {number} images with words; it needs two at least.")


def measure_information(model, processor, rows: CaptionedImages, batch_size: int) -> dict:
    """Return by how many nats captions make their images likelier, and images their captions.

    An image's codes are scored behind its caption and behind nothing; a caption's words and what ends them behind its
    image and, before an image, behind nothing. That an image or words come first is none of what is scored.
    """
    encoder = DocumentEncoder(processor)
    pairs = [
        (encoder.text_ids(text), image) for text, image in zip(rows.captions, rows.codes.tolist()) if text.strip()
    ]
    if len(pairs) < 2:
        raise InputError(f"information: {len(pairs)} pairs of an image and its caption; there must be two at least.")
    words = [ids for ids, _ in pairs]
    framed = [processor.image_ids(image) for _, image in pairs]
    begin, codes = framed[0][0], [ids[1:-1] for ids in framed]
    nothing = [encoder.opened([])] * len(pairs)

    def nats(before, after):
        return -paired_log_probs(model, before, after, batch_size)

    image = {
        "alone": nats([[*ids, begin] for ids in nothing], codes),
        "with_other": nats([[*encoder.opened(ids), begin] for ids in words], codes),
    }
    caption = {
        "alone": nats(nothing, [[*ids, begin] for ids in words]) + _words_come_first(model, nothing[0], begin),
        "with_other": nats([encoder.opened(ids) for ids in framed], [[*ids, encoder.eos] for ids in words]),
    }
    found: dict = {"pairs": len(pairs)}
    for name, by_condition in (("image", image), ("caption", caption)):
        taken_N = by_condition["alone"] - by_condition["with_other"]
        found[name] = {condition: values_N.mean().item() for condition, values_N in by_condition.items()}
        found[name] |= {
            "taken": taken_N.mean().item(),
            "standard_error": taken_N.std().item() / math.sqrt(len(pairs)),
        }
    by_image, by_caption = found["image"]["taken"], found["caption"]["taken"]
    return {**found, "ratio": by_image / by_caption if by_caption > 0 else None}


@torch.no_grad()
def _words_come_first(model, ids: list[int], begin: int) -> float:
    """Return the log-probability that a document does not begin with an image."""
    logits_V = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1]
    return torch.log1p(-logits_V.double().softmax(-1)[begin]).item()
