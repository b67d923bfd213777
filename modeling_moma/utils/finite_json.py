# SPDX-License-Identifier: Apache-2.0
"""Figures as JSON, which has neither NaN nor infinity."""

import json
import math
from typing import Any


def finite_json(content: Any) -> str:
    """Return the text of a JSON file, with `null` for figures that are no finite numbers."""
    return json.dumps(only_finite(content), indent=2, allow_nan=False) + "\n"


def only_finite(content: Any) -> Any:
    """Return the same content with `None` for figures that are no finite numbers."""
    if isinstance(content, dict):
        return {key: only_finite(part) for key, part in content.items()}
    if isinstance(content, (list, tuple)):
        return [only_finite(part) for part in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
