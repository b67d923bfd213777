# SPDX-License-Identifier: Apache-2.0
"""How alike drawn and real images are, on the judge's features, with references by which the figures can be read."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork

from ..errors_moma import InputError
from ..utils.errors import needs_extra
from .distributions import frechet_distance, precision_recall
from .held_out import CaptionedImages
from .measures import decode_images, draw_images


NEIGHBOURS = 3
# either half must have neighbours enough
LEAST_IMAGES = 2 * (NEIGHBOURS + 1)


def feature_extractor(device: str | torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from pixel values `[B, 3, H, W]` in [-1, 1] to features `[B, 1280]`."""
    # channels_last is a third faster on CPUs
    layout = torch.channels_last
    with needs_extra("drawings are compared by a trained network", "train"):
        network: Any = MomaVQPerceptualNetwork()
    network.to(device=device, memory_format=layout)
    return lambda images: network.features(images.to(device=device, memory_format=layout))


def all_features(extract: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the features `[N, D]` of images given in batches of pixel values, on the CPU."""
    return torch.cat([extract(batch).cpu() for batch in batches])


def measure_drawings(
    model,
    processor,
    rows: CaptionedImages,
    extract: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
    sampling: dict,
    seed: int = 0,
) -> dict:
    """Draw an image for each caption, and compare all of them with the real ones."""
    check_drawings(processor, len(rows))
    # before the drawings, which take long: an image that cannot be read ends them
    real = None if rows.images is None else all_features(extract, rows.images)
    if real is not None and len(real) != len(rows):
        raise InputError(f"`images` holds {len(real)} images, but `codes` {len(rows)}: one for each is needed.")
    drawn_codes = draw_images(model, processor, rows.captions, batch_size, sampling, seed)
    drawn = all_features(extract, decode_images(processor, drawn_codes, batch_size))
    reconstructed = all_features(extract, decode_images(processor, rows.codes, batch_size))
    real = reconstructed if real is None else real
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    half = len(rows) // 2
    one, other = order[:half], order[half : 2 * half]
    comparisons = {"drawn": compare_features(real, drawn)}
    if rows.images is not None:
        comparisons["reconstructed"] = compare_features(real, reconstructed)
    comparisons["drawn, halves"] = compare_features(real[other], drawn[one])
    comparisons["real, halves"] = compare_features(real[other], real[one])
    return {
        "images": len(rows),
        "sampling": sampling,
        "real": "reconstructions" if rows.images is None else "images",
        "comparisons": comparisons,
    }


def check_drawings(processor, num_images: int):
    """Raise `ValueError` where drawings could not be compared with so many images, before time is spent on them."""
    if num_images < LEAST_IMAGES:
        raise InputError(f"drawings: {num_images} images to compare with, but at least {LEAST_IMAGES} are needed.")
    if not processor.has_image_decoder:
        raise InputError("drawings: the image tokenizer has no decoder (use_decoder=False), so it can show none.")


def compare_features(real: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """Compare features `[N, D]` with real ones: `images` on either side, Frechet distance, precision, recall."""
    return {
        "images": len(others),
        "frechet_distance": frechet_distance(real, others),
        **precision_recall(real, others, NEIGHBOURS),
    }
