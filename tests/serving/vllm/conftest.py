# SPDX-License-Identifier: Apache-2.0
"""Settings of vLLM, which it reads when it is imported."""

import os
from importlib.util import find_spec


if find_spec("vllm") is not None:
    os.environ.update(
        # the engine lives in the tests' own process; the server's has processes of its own
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        # GiB
        VLLM_CPU_KVCACHE_SPACE="1",
        # the cores that the caller gave, whichever they are
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )


def pytest_collection_modifyitems(items):
    # an engine in this process puts vLLM's own class under the model's, which then cannot be built without vLLM
    items.sort(key=lambda item: item.path.name == "test_engine.py")
