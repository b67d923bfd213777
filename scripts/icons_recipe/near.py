# SPDX-License-Identifier: Apache-2.0
"""Finds every pair of near-identical drawings among hundreds of thousands."""

from collections.abc import Callable

import numpy as np
import torch

from icons_recipe.drawing import GREY_SIDE


# mean difference of 16x16 grey values, of 255
LIMIT = 6.0
_LEAF = 256
_CHUNK = 1 << 18


def near_pairs(
    greys: np.ndarray, limit: float = LIMIT, on_done: Callable[[int], None] = lambda rows: None
) -> np.ndarray:
    """
    Finds all pairs of rows whose mean absolute difference is below a limit. None is missed.

    The mean difference of an image is never below that of the same image at a quarter of its side. So rows are put
    into boxes by their 4x4 values, boxes too far apart are never compared, and the few pairs that are close at 4x4 are
    compared at 8x8, then at 16x16.

    Args:
        greys: uint8 of shape `(rows, 256)`, as [`small_grey`] returns them.
        limit: pairs below this mean difference are near-identical.
        on_done: called with the number of rows done, again and again.

    Returns:
        int64 of shape `(pairs, 2)`, each pair once with the smaller row first, in ascending order.
    """
    if greys.ndim != 2 or greys.shape[1] != GREY_SIDE**2 or greys.dtype != np.uint8:
        raise ValueError(f"`greys` is {greys.dtype} of shape {greys.shape}, not uint8 of shape (rows, 256).")
    coarse, middle = (_block_means(greys, side) for side in (4, 8))
    leaves = _leaves(coarse)
    order = np.concatenate(leaves)
    bounds = np.cumsum([0, *map(len, leaves)])
    low = np.stack([coarse[leaf].min(axis=0) for leaf in leaves])
    high = np.stack([coarse[leaf].max(axis=0) for leaf in leaves])
    # sums of float32 values may be off in the last places
    coarse_limit = (limit + 1e-3) * coarse.shape[1]
    found = [np.empty((0, 2), dtype=np.int64)]
    for number, leaf in enumerate(leaves):
        gaps = np.maximum(low[number:] - high[number], low[number] - high[number:]).clip(0).sum(axis=1)
        near = number + np.flatnonzero(gaps < coarse_limit)
        others = np.concatenate([order[bounds[i] : bounds[i + 1]] for i in near])
        outside = np.maximum(coarse[others] - high[number], low[number] - coarse[others]).clip(0).sum(axis=1)
        others = others[outside < coarse_limit]
        distances = torch.cdist(torch.from_numpy(coarse[leaf]), torch.from_numpy(coarse[others]), p=1).numpy()
        first, second = np.nonzero(distances < coarse_limit)
        pairs = np.sort(np.stack([leaf[first], others[second]], axis=1), axis=1)
        found.append(_close(pairs[pairs[:, 0] < pairs[:, 1]], middle, greys, limit))
        on_done(len(leaf))
    return np.unique(np.concatenate(found), axis=0)


def _block_means(greys, side):
    step = GREY_SIDE // side
    blocks = greys.reshape(-1, side, step, side, step)
    return blocks.mean(axis=(2, 4), dtype=np.float32).reshape(-1, side * side)


def _leaves(points):
    """Halves the rows along the widest of their dimensions until the parts are small."""
    open_parts, leaves = [np.arange(len(points))], []
    while open_parts:
        rows = open_parts.pop()
        if len(rows) <= _LEAF:
            leaves.append(rows)
            continue
        values = points[rows]
        widest = int(values.std(axis=0).argmax())
        ordered = rows[np.argsort(values[:, widest], kind="stable")]
        open_parts += [ordered[: len(rows) // 2], ordered[len(rows) // 2 :]]
    return leaves


def _close(pairs, middle, greys, limit):
    """Returns those of the pairs that are below the limit, first by 8x8 means, then by all values."""
    kept = []
    for start in range(0, len(pairs), _CHUNK):
        part = pairs[start : start + _CHUNK]
        distances = np.abs(middle[part[:, 0]] - middle[part[:, 1]]).sum(axis=1)
        part = part[distances < (limit + 1e-3) * middle.shape[1]]
        first, second = greys[part[:, 0]], greys[part[:, 1]]
        exact = (np.maximum(first, second) - np.minimum(first, second)).sum(axis=1, dtype=np.int64)
        kept.append(part[exact < limit * greys.shape[1]])
    return np.concatenate(kept) if kept else pairs
