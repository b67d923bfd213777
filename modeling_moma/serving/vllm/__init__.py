# SPDX-License-Identifier: Apache-2.0
"""MoMa in vLLM: the plugin that vLLM finds by itself, and the grammar of frames in its form.

Nothing here is imported by the rest of the package, and only the modules that vLLM loads import vLLM.
"""

from .grammar import FREE, FrameGrammar, FrameRow, Verdict
from .guidance import engine_logprobs, guided_frame, server_logprobs
from .plugin import register


__all__ = [
    "FREE",
    "FrameGrammar",
    "FrameRow",
    "Verdict",
    "engine_logprobs",
    "guided_frame",
    "register",
    "server_logprobs",
]
