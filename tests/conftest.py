# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests."""

import gc


def pytest_collection_finish(session):
    """A trainer collects garbage at its start and end: what is imported by then, no garbage, need not be searched."""
    gc.collect()
    gc.freeze()
