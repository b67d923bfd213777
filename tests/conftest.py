# SPDX-License-Identifier: Apache-2.0
"""Keeps what was imported out of the way of garbage collections, of which each training of `Trainer` asks for one."""

import gc
import sys


# so many modules come with a library; a few more are not worth a collection
MANY_MODULES = 200
_frozen_modules = 0


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
