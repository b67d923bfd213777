# SPDX-License-Identifier: Apache-2.0
"""Groups of what is linked, directly or through others."""

from collections.abc import Iterable

import numpy as np


def linked_groups(size: int, links: Iterable[tuple[int, int]]) -> np.ndarray:
    """
    Groups numbers that are linked, directly or through others.

    Args:
        size: the numbers are 0 to `size - 1`.
        links: pairs of numbers.

    Returns:
        The smallest number of each number's group, int64 of shape `(size,)`.
    """
    parent = list(range(size))

    def root(item):
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for first, second in links:
        first, second = root(first), root(second)
        # the smaller one is the root, so that the result does not depend on the order of the links
        parent[max(first, second)] = min(first, second)
    return np.array([root(item) for item in range(size)], dtype=np.int64)
