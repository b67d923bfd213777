# SPDX-License-Identifier: Apache-2.0
"""Tests that take longer than what they guard is worth on every commit."""

import os

import pytest


slow = pytest.mark.skipif(os.environ.get("RUN_SLOW") != "1", reason="slow: RUN_SLOW=1 runs it")
