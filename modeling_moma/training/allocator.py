# SPDX-License-Identifier: Apache-2.0
"""Memory that tensors gave back, kept for the next step."""

import ctypes
import os
import platform


# of `malloc.h`
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# bytes from which on an allocation is one of its own, given back to the system as soon as it is freed
_LARGEST_KEPT = 2**30
_NEVER = -1
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """
    Let glibc keep freed memory for this process, in place of handing large tensors back to the system.

    Gradients, logits and activations of a training step on a CPU are as large as those of the step before. Asked for
    anew, each of their pages is cleared and entered again, which takes 12 to 16 % of a step
    (`benchmarks/reports/2026-11-27-what-was-tried-cpu.md`). The peak grows by 2 to 5 %, and the process does not
    shrink before it ends.

    Returns:
        Whether it does: not without glibc, nor where the environment sets glibc's allocator already.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SETTINGS):
        return False
    set_option = ctypes.CDLL(None).mallopt
    return bool(set_option(_M_MMAP_THRESHOLD, _LARGEST_KEPT)) and bool(set_option(_M_TRIM_THRESHOLD, _NEVER))


__all__ = ["keep_freed_memory"]
