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
"""The released model, for tests that need its weights."""

from pathlib import Path

import pytest

from modeling_moma.hub.upload import prepare, write_repository


RELEASED = Path(__file__).resolve().parents[2] / "model_cards" / "moma-emoji"
# more than the pointer that Git leaves in the place of a large file
LEAST_SIZE = 1_000_000


def released_repository(folder: Path) -> Path:
    """The released model as it lies on the Hub, with the code of the installed packages, written into a folder."""
    return write_repository(prepare(RELEASED, datasets={"data/emoji": "someone/emoji"}), folder)


def skip_without_released_model():
    """Skips a test, or those of a fixture, in a checkout without large files."""
    weights = RELEASED / "model.safetensors"
    if not weights.exists() or weights.stat().st_size < LEAST_SIZE:
        pytest.skip("the released model is not here: a checkout without large files")
