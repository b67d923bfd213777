# SPDX-License-Identifier: Apache-2.0
"""Links from pages to files beside `docs/` work where the repository is browsed; the site names the file instead."""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Replace what leaves `docs/` by its text and the path in the repository."""
    folder = Path(page.file.abs_src_path).resolve().parent

    def name_file(found):
        text, target = found.groups()
        path = (folder / target).resolve()
        # what does not exist stays a link, which the strict build refuses
        if path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT) or not path.exists():
            return found[0]
        name = f"`{path.relative_to(ROOT)}`"
        return name if text.strip("`") == name.strip("`") else f"{text} ({name})"

    return _LINK.sub(name_file, markdown)
