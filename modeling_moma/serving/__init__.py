# SPDX-License-Identifier: Apache-2.0
"""Two ways to serve a model: `http` checks requests for `transformers serve`, `vllm` is a plugin of vLLM."""
