# SPDX-License-Identifier: Apache-2.0
"""Puts the fetched common tests on the path; without them, only the test that says how to get them remains."""

import sys

from helpers.fetch import common_tests_folder, is_fetched


MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "slow",
    "torch_compile_test",
)

if is_fetched():
    sys.path.append(str(common_tests_folder()))
else:
    collect_ignore_glob = ["test_*_common.py"]


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by Transformers' common tests")
