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
"""The README's length, and the parts of pages that scripts write; code and commands are tests/test_docs.py's."""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def test_measured_parts_of_the_page_on_routing_are_filled():
    text = (ROOT / "docs" / "concepts" / "routing.md").read_text()
    markers = re.findall(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->", text, flags=re.DOTALL)
    assert [name for name, _ in markers] == re.findall(r"<!-- (\w+) -->", text)
    assert [name for name, _ in markers] == ["routings"]
    assert all("|" in part for _, part in markers)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
