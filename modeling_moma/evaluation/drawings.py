# SPDX-License-Identifier: Apache-2.0
"""How alike drawn and real images are, on the judge's features, with references by which the figures can be read.

Shape suffixes:
    N features of a set, D their dimensions, M centres.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork

from ..errors_moma import InputError
from ..utils.errors import needs_extra
from .held_out import CaptionedImages
from .measures import decode_images, draw_images


NEIGHBOURS = 3
# either half must have neighbours enough
LEAST_IMAGES = 2 * (NEIGHBOURS + 1)
# features whose distances to all others are held at once
CHUNK = 1024


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


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the squared 2-Wasserstein distance of Gaussians with the means and covariances of two sets of features.

    Few images make it larger than it would be of many, so compare only figures that stand on equally many.
    """
    _check(first, second, least=2)
    first, second = first.double(), second.double()
    gap = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    root_first, root_second = _covariance_root(first), _covariance_root(second)
    # if C = R^T R, the eigenvalues of C1 C2 are the squared singular values of R1 R2^T: no root of tiny numbers
    overlap = torch.linalg.svdvals(root_first @ root_second.T).sum()
    spread = root_first.square().sum() + root_second.square().sum()
    return max(0.0, (gap + spread - 2 * overlap).item())


def _covariance_root(features_ND: torch.Tensor) -> torch.Tensor:
    """Return a matrix R of at most D rows, `R^T R` the unbiased covariance."""
    num, dimensions = features_ND.shape
    centred = (features_ND - features_ND.mean(dim=0)) / (num - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r")[1] if num > dimensions else centred


def precision_recall(real: torch.Tensor, drawn: torch.Tensor, neighbours: int = 3) -> dict[str, float]:
    """Return improved precision and recall (arXiv 1904.06991).

    A set covers all that is no farther from one of its members than that member's k-th nearest neighbour in the set.
    """
    _check(real, drawn, least=neighbours + 1)
    real, drawn = real.double(), drawn.double()
    return {
        "precision": _covered(drawn, real, neighbours).double().mean().item(),
        "recall": _covered(real, drawn, neighbours).double().mean().item(),
    }


def _covered(points_ND: torch.Tensor, centres_MD: torch.Tensor, neighbours: int) -> torch.Tensor:
    """Return True for each point that lies within the reach of a centre, `[N]`."""
    # a centre is its own nearest
    reach_M = torch.cat(
        [_distances(chunk, centres_MD).kthvalue(neighbours + 1, dim=1).values for chunk in centres_MD.split(CHUNK)]
    )
    return torch.cat([(_distances(chunk, centres_MD) <= reach_M).any(dim=1) for chunk in points_ND.split(CHUNK)])


def _distances(points_ND: torch.Tensor, centres_MD: torch.Tensor) -> torch.Tensor:
    # distances from differences: matmuls would tell equal points apart
    return torch.cdist(points_ND, centres_MD, compute_mode="donot_use_mm_for_euclid_dist")


def _check(first: torch.Tensor, second: torch.Tensor, least: int):
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise InputError(
            f"features: shapes {tuple(first.shape)} and {tuple(second.shape)}; both must be [N, D], D equal."
        )
    fewest = min(len(first), len(second))
    if fewest < least:
        raise InputError(f"features: a set has {fewest} images, but at least {least} are needed.")
