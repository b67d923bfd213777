# SPDX-License-Identifier: Apache-2.0
"""Noise on the codes that a training reads, as a model meets its own errors when it draws."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CodeNoise:
    """Puts random codes in the place of some of an image's codes, in what is read and not in what is to be predicted.

    The noisy context of reAR (arXiv 2510.04450), without its losses on embeddings: each document draws its share of
    wrong codes between 0 and `most`, each code is then replaced with that probability, by any code of the codebook.

    Args:
        most (`float`):
            largest share of a document's codes.
        first (`int`):
            id of the first code.
        end (`int`):
            id behind the last one.
    """

    most: float
    first: int
    end: int

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a batch of the same labels.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                `input_ids` and `labels` of shape `(batch, length)`; documents begin where `position_ids`, if there are
                any, are 0, and each row is one otherwise.
        """
        ids, positions = inputs["input_ids"], inputs.get("position_ids")
        starts = torch.zeros_like(ids) if positions is None else (positions == 0).long()
        documents = starts.cumsum(dim=1)
        # one for each document that a row may have: how many it has would be waited for
        shares = self.most * torch.rand(len(ids), ids.shape[1] + 1, device=ids.device)
        is_replaced = torch.rand(ids.shape, device=ids.device) < shares.gather(1, documents)
        is_replaced &= (ids >= self.first) & (ids < self.end)
        others = torch.randint_like(ids, self.first, self.end)
        return {**inputs, "input_ids": torch.where(is_replaced, others, ids)}


__all__ = ["CodeNoise"]
