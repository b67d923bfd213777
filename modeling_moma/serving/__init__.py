# SPDX-License-Identifier: Apache-2.0
"""Two ways to serve a model: `http` is the server of `moma serve`, `vllm` a plugin of vLLM."""
