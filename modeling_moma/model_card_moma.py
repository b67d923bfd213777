# SPDX-License-Identifier: Apache-2.0
"""The card that a plain `push_to_hub` gives a model: what the Hub finds it by."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


TAGS = ("moma", "mixture-of-experts", "early-fusion")


def complete_model_card(path: str | Path):
    """Fill in what the author of a card left open: library, task and tags. License and data are the author's to name.

    Args:
        path (`str` or `Path`): a card's file, which is written anew.
    """
    card = ModelCard.load(path)
    data: ModelCardData = card.data  # pyright: ignore[reportAssignmentType]
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or "any-to-any"
    tags = data.tags or []
    data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    card.save(path)


__all__ = ["complete_model_card"]
