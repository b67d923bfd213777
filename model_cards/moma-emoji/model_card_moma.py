# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The card that a plain `push_to_hub` gives a model: what the Hub finds it by."""

from pathlib import Path

from huggingface_hub import ModelCard


TAGS = ("moma", "mixture-of-experts", "early-fusion")


def complete_model_card(path: str | Path):
    """Fill in what the author of a card left open: library, task and tags. License and data are the author's to name.

    Args:
        path (`str` or `Path`): a card's file, which is written anew.
    """
    card = ModelCard.load(path)
    card.data.library_name = card.data.library_name or "transformers"
    card.data.pipeline_tag = card.data.pipeline_tag or "any-to-any"
    tags = card.data.tags or []
    card.data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    card.save(path)


__all__ = ["complete_model_card"]
