# SPDX-License-Identifier: Apache-2.0
"""Code for processes that must do without our packages."""

# put before the code of such a process: importing the installed packages is an error from then on
WITHOUT_PACKAGES = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("modeling_moma", "tokenization"):
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
"""
