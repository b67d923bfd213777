# SPDX-License-Identifier: Apache-2.0
"""What commands have written about themselves, objects in JSON, as later ones read it."""

import json
from pathlib import Path
from typing import Any

from ..errors_moma import InputError


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
