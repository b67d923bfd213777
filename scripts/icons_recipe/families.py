# SPDX-License-Identifier: Apache-2.0
"""Families: sets of one maker, or sets that draw alike."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from image_sets.components import linked_groups


_FAMILIES = {
    "boxicons": ("boxicons", "bx", "bxs"),
    "fluent": ("fluent", "fluent-color", "fluent-mdl2"),
    "fluent-emoji": ("fluent-emoji-flat", "fluent-emoji-high-contrast"),
    "font-awesome": ("fa", "fa-regular", "fa-solid", "fa6-regular", "fa6-solid", "fa7-regular", "fa7-solid"),
    "glyphs": ("glyphs", "glyphs-poly"),
    "emojione": ("emojione", "emojione-monotone"),
    "heroicons": ("heroicons", "heroicons-outline", "heroicons-solid"),
    "icon-park": ("icon-park", "icon-park-outline", "icon-park-solid", "icon-park-twotone"),
    "icons8": ("icons8", "flat-color-icons", "la", "wpf"),
    "ion": ("ion", "famicons"),
    "lucide": ("lucide", "lucide-lab"),
    "material": ("material-symbols", "material-symbols-light", "ic", "mdi", "mdi-light"),
    "pepicons": ("pepicons-pencil", "pepicons-pop", "pepicons-print"),
    "streamline-freehand": ("streamline-freehand", "streamline-freehand-color"),
    "unicons": ("uil", "uim", "uis", "uit"),
}
_OF_SET = {prefix: family for family, prefixes in _FAMILIES.items() for prefix in prefixes}
# pairs of families with fewer names in common say nothing
_LEAST_SHARED = 50
# of the names in common; below it, arrows, crosses and other simple shapes link most sets to one another by chains
_ALIKE_SHARE = 0.3


def maker_family(prefix: str) -> str:
    """Returns the family of a set by its maker: `"material"` for `"mdi"`; most sets are a family of their own."""
    if prefix in _OF_SET:
        return _OF_SET[prefix]
    return "streamline" if prefix.startswith("streamline") else prefix


def merge_alike(
    families: Sequence[str], names: Sequence[str], pairs: np.ndarray, least_shared: int = _LEAST_SHARED
) -> dict[str, str]:
    """
    Merges families that draw more than 30 % of the names they share near-identically.

    Args:
        families: the family of each row.
        names: the name of each row.
        pairs: row numbers of near-identical drawings, int of shape `(pairs, 2)`.
        least_shared: families that share fewer names stay apart.

    Returns:
        The merged family of each family, which is the first of its members in the alphabet.
    """
    holders = defaultdict(set)
    for family, name in zip(families, names, strict=True):
        holders[name].add(family)
    shared = Counter()
    for members in holders.values():
        ordered = sorted(members)
        shared.update((a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :])
    alike = {
        (*sorted((families[i], families[j])), names[i])
        for i, j in pairs.tolist()
        if families[i] != families[j] and names[i] == names[j]
    }
    common = Counter((a, b) for a, b, _ in alike)
    ordered = sorted(set(families))
    index = {family: number for number, family in enumerate(ordered)}
    links = [
        (index[a], index[b])
        for (a, b), count in common.items()
        if shared[a, b] >= least_shared and count > _ALIKE_SHARE * shared[a, b]
    ]
    groups = linked_groups(len(ordered), links)
    return {family: ordered[groups[number]] for family, number in index.items()}
