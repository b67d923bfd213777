# SPDX-License-Identifier: Apache-2.0
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
