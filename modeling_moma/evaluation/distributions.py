# SPDX-License-Identifier: Apache-2.0
"""How alike two sets of images are, by their features: Frechet distance, and precision and recall.

Shape suffixes:
    N features of a set, D their dimensions, M centres.
"""

import torch

from ..errors_moma import InputError


# features whose distances to all others are held at once
CHUNK = 1024


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
