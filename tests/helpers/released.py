# SPDX-License-Identifier: Apache-2.0
"""The released model, for tests that need its weights."""

import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from safetensors.torch import load_file, save_file

from modeling_moma.hub.upload import lay_out


RELEASED = Path(__file__).resolve().parents[2] / "model_cards" / "moma-emoji"
# more than the pointer that Git leaves in the place of a large file
LEAST_SIZE = 1_000_000


def released_repository(folder: Path) -> Path:
    """The released model as it lies on the Hub, with the code of the installed packages, written into a folder."""
    with TemporaryDirectory() as links:
        lay_out(Path(links), RELEASED, datasets={"data/emoji": "someone/emoji"})
        return shutil.copytree(links, folder)


def write_shallow(source: Path, folder: Path, layers: int = 2):
    """Write the folder of a released model with its first layers alone, for what is about no layer in particular."""
    # a memory is one of the whole model
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("memory"))
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))

    def stays(name):
        found = re.match(r"model\.layers\.(\d+)\.", name)
        return found is None or int(found[1]) < layers

    tensors = load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if stays(name)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def skip_without_released_model():
    """Skips a test, or those of a fixture, in a checkout without large files."""
    weights = RELEASED / "model.safetensors"
    if not weights.exists() or weights.stat().st_size < LEAST_SIZE:
        pytest.skip("the released model is not here: a checkout without large files")
