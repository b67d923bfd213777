# SPDX-License-Identifier: Apache-2.0
"""What commands write about themselves, objects in JSON, and the hashes by which they know files again."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors_moma import InputError


_BLOCK_BYTES = 1 << 16


def read_record(path: Path, advice: str = "") -> dict[str, Any]:
    """Return what a command has written about itself."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
        problem = f"it holds a {type(record).__name__}"
    except ValueError as error:
        problem = f"it cannot be read as JSON ({error})"
    raise InputError(f"{str(path)!r}: {problem}; was its folder copied in part, or changed by hand? {advice}".rstrip())


def finite_json(content: Any) -> str:
    """Return the text of a JSON file, with `null` for figures that are no finite numbers: JSON has none of those."""
    return json.dumps(only_finite(content), indent=2, allow_nan=False) + "\n"


def only_finite(content: Any) -> Any:
    """Return the same content with `None` for figures that are no finite numbers."""
    if isinstance(content, dict):
        return {key: only_finite(part) for key, part in content.items()}
    if isinstance(content, (list, tuple)):
        return [only_finite(part) for part in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def files_digest(paths: Iterable[Path], blocks: int = 256) -> str:
    """Return a hash of files, of their sizes and of blocks that are spread over each, wherever they lie."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        step = max(_BLOCK_BYTES, -(-size // blocks))
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:32]
