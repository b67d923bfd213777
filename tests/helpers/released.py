# SPDX-License-Identifier: Apache-2.0
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
