# SPDX-License-Identifier: Apache-2.0
"""Errors of what is tested, as failures of the test that says so."""

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def must_not_raise(*errors: type[Exception]) -> Iterator[None]:
    """Fail the test by name where the block raises one of these."""
    try:
        yield
    except errors as error:
        pytest.fail(f"{type(error).__name__}: {error}")
