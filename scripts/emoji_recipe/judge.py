# SPDX-License-Identifier: Apache-2.0
"""Says what an image shows: the label of the nearest training image that another designer drew."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from emoji_recipe.cells import drawing_family
from modeling_moma.evaluation.drawings import all_features


LEVELS = ("label", "subgroup", "group")


@dataclass
class ImageJudge:
    """Nearest neighbour, by the cosine of ImageNet features, among reference images of other drawing families.

    Excluding the asked style's own family makes it a test of what is drawn, not of how one designer draws.

    Args:
        extract: pixel values `[B, 3, H, W]` in [-1, 1] to features `[B, D]`, such as
            `MomaVQPerceptualNetwork().features`.
        features: `[N, D]`, of the reference images.
        rows: `style`, `label`, `subgroup` and `group` of each reference image.

    Raises:
        ValueError: features and rows are of different number.
    """

    extract: Callable[[torch.Tensor], torch.Tensor]
    features: torch.Tensor
    rows: Sequence[dict]

    def __post_init__(self):
        if len(self.features) != len(self.rows):
            raise ValueError(f"`features` has {len(self.features)} rows, but `rows` has {len(self.rows)}.")
        self.features = F.normalize(self.features.float(), dim=1)
        self.families = np.array([drawing_family(row["style"]) for row in self.rows])

    @classmethod
    def from_batches(
        cls, extract: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor], rows: Sequence[dict]
    ) -> "ImageJudge":
        """Builds the judge from batches of the reference images' pixel values."""
        return cls(extract, all_features(extract, batches), rows)

    def nearest(self, batches: Iterable[torch.Tensor], styles: Sequence[str]) -> list[dict]:
        """
        Finds the reference image that each image resembles most.

        Args:
            batches: pixel values, in the order of `styles`.
            styles: the style that each image has or should have; its family is left out.

        Returns:
            The row of each neighbour.

        Raises:
            ValueError: the number of images is not that of styles, or all references are of one family.
        """
        features = F.normalize(all_features(self.extract, batches).float(), dim=1)
        if len(features) != len(styles):
            raise ValueError(f"`batches` hold {len(features)} images, but `styles` has {len(styles)}.")
        families = np.array([drawing_family(style) for style in styles])
        same_family = torch.from_numpy(families[:, None] == self.families[None, :])
        if same_family.all(dim=1).any():
            raise ValueError(f"`rows` has no image outside of the families {sorted(set(self.families))}.")
        similarity = (features @ self.features.T).masked_fill(same_family, -torch.inf)
        return [self.rows[index] for index in similarity.argmax(dim=1).tolist()]


def accuracies(found: Sequence[dict | None], wanted: Sequence[dict]) -> dict[str, float]:
    """
    Shares of rows whose label, subgroup and group are right.

    Args:
        found: a row with `label`, `subgroup` and `group` for each image, or `None` where there is no answer.
        wanted: the true rows. Same length.

    Returns:
        Shares in [0, 1] by level.
    """
    if len(found) != len(wanted) or not wanted:
        raise ValueError(f"`found` has {len(found)} rows and `wanted` {len(wanted)}: they must be as many, and some.")
    pairs = list(zip(found, wanted, strict=True))
    return {
        level: sum(row is not None and row[level] == target[level] for row, target in pairs) / len(pairs)
        for level in LEVELS
    }
