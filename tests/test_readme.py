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
import re
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).resolve().parent.parent


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    if not (ROOT / "model_cards" / "moma-emoji" / "model.safetensors").exists():
        pytest.skip("the released model is not here: a checkout without large files")
    for folder in ("model_cards", "data"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert Image.open("apple.png").size == (64, 64)


def test_measured_parts_of_the_readme_are_filled():
    text = (ROOT / "README.md").read_text()
    markers = re.findall(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->", text, flags=re.DOTALL)
    assert [name for name, _ in markers] == re.findall(r"<!-- (\w+) -->", text)
    assert all("|" in part for _, part in markers)
