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
"""The commands of the worked example, one after the other, on a model of one layer and a handful of pictures."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image


ROOT = Path(__file__).resolve().parent.parent
# what makes the example small enough for a test
SMALLER = {
    "make_text_model": {"--layers": "1"},
    "tokenize_pictures": {"--data": "pictures", "--codings": "2"},
    "pretrain": {"--steps": "2", "--batch-size": "2", "--eval-steps": "2", "--eval-examples": "2"},
}


def commands(document: Path) -> list[list[str]]:
    """The commands in the document's shell blocks, word by word."""
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def write_pictures(folder: Path):
    """A data set with the columns of data/emoji: six pictures to train on, four held out."""
    rng = np.random.default_rng(0)
    features = Features(
        image=ImageFeature(), style=Value("string"), label=Value("string"), keywords=List(Value("string"))
    )
    for split, rows in (("train", 6), ("validation", 4)):
        pictures = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(rows)]
        columns = {"style": ["noto"] * rows, "label": ["red apple"] * rows, "keywords": [["fruit"]] * rows}
        Dataset.from_dict({"image": pictures, **columns}, features=features).to_parquet(folder / f"{split}.parquet")


def test_a_text_model_becomes_one_that_draws(tmp_path, monkeypatch):
    if not (ROOT / "model_cards" / "moma-emoji" / "model.safetensors").exists():
        pytest.skip("the released model is not here: a checkout without large files")
    for folder in ("model_cards", "data"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    write_pictures(tmp_path / "pictures")
    ran = []
    for words in commands(ROOT / "docs" / "start-from-a-text-model.md"):
        # the real text model is fetched instead of the random one, which is made by the next command
        if words[0] == "hf":
            continue
        assert words[0] == "python"
        name, arguments = Path(words[1]).stem, words[2:]
        ran.append(name)
        for option, value in SMALLER.get(name, {}).items():
            if option in arguments:
                arguments[arguments.index(option) + 1] = value
            else:
                arguments += [option, value]
        assert importlib.import_module(name).main(arguments) in (None, 0), name
    assert ran == ["make_text_model", "convert", "tokenize_pictures", "pretrain", "upcycle", "release", "generate"]
    assert Image.open("apple.png").size == (64, 64)
