# SPDX-License-Identifier: Apache-2.0
"""Without the fetched files nothing else of this folder is collected: that must not pass unseen."""

import sys

from helpers import fetch


def test_transformers_own_tests_were_fetched():
    folder = fetch.common_tests_folder()
    command = f"{sys.executable} {fetch.__file__}"
    assert fetch.is_fetched(), f"Transformers' common tests are not all in {folder}. Fetch them (online): {command}"
