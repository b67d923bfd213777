# SPDX-License-Identifier: Apache-2.0
"""Keeps what was imported out of the way of garbage collections, of which each training of `Trainer` asks for one."""

import gc
import sys

import pytest
from huggingface_hub import constants


# so many modules come with a library; a few more are not worth a collection
MANY_MODULES = 200
_frozen_modules = 0


@pytest.fixture(scope="session", autouse=True)
def own_assets(tmp_path_factory):
    """Keep what searches have coded out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("assets"))
        patch.setenv("HF_ASSETS_CACHE", folder)
        patch.setattr(constants, "HF_ASSETS_CACHE", folder)
        yield folder


@pytest.fixture(scope="module")
def processor():
    """The tiny processor of a file of tests."""
    from helpers.tiny import tiny_processor

    return tiny_processor()


def pytest_collection_finish(session):
    _freeze_imports()


def pytest_runtest_setup(item):
    # libraries that a test before has imported
    if len(sys.modules) > _frozen_modules + MANY_MODULES:
        _freeze_imports()


def _freeze_imports():
    global _frozen_modules
    gc.collect()
    gc.freeze()
    _frozen_modules = len(sys.modules)
