# SPDX-License-Identifier: Apache-2.0
"""A server as a user starts it, asked by the `openai` client."""

import sys
from contextlib import contextmanager

import pytest

from helpers.server_process import running


@contextmanager
def client_of_server(words, folder, cwd):
    """A client of the server that `python` with these words starts; `folder` keeps its log and its home."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="the extra `serve` is missing")
    openai = pytest.importorskip("openai")
    command = [sys.executable, *words, "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
    # nothing of this machine's settings and cached models
    variables = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        with (
            running(command, folder / "log.txt", cwd=cwd, variables=variables) as (address, _),
            openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client,
        ):
            yield client
