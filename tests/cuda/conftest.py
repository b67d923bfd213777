# SPDX-License-Identifier: Apache-2.0
"""What ships, on a CUDA device: a real one where there is one, or else a pretended one (`make test-cuda`)."""

from pathlib import Path

import pytest

from helpers.cuda.device import open_device


# without a device one file is read, which says that the rest is skipped
if open_device() is None:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_device.py"]


@pytest.fixture
def device():
    """The device, which is there for as long as the test takes."""
    with open_device() as device:
        yield device


@pytest.fixture
def pretended(device):
    """The pretended one alone."""
    if not device.is_pretended:
        pytest.skip("a real device does not tell of this")
    return device
