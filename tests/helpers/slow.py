# SPDX-License-Identifier: Apache-2.0
"""Tests that take longer than what they guard is worth on every commit."""

import os

import pytest


RUN_SLOW = os.environ.get("RUN_SLOW") == "1"
slow = pytest.mark.skipif(not RUN_SLOW, reason="slow: RUN_SLOW=1 runs it")
