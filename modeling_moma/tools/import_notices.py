# SPDX-License-Identifier: Apache-2.0
"""What optional libraries say of themselves while Transformers imports them, whether or not anybody uses them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


# torchao and bitsandbytes tell of kernels that they could not load, torch of how torchao registers its types
OPTIONAL_LIBRARIES = ("torchao", "bitsandbytes", "torch.utils._pytree")


@contextmanager
def without_import_notices() -> Iterator[None]:
    """
    Drops warnings that [`OPTIONAL_LIBRARIES`] log meanwhile. Their errors pass, and so does all that others say.

    Whoever uses one of them imports it before this package, or sees what it says when it is used.
    """
    levels = {name: logging.getLogger(name).level for name in OPTIONAL_LIBRARIES}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


__all__ = ["without_import_notices"]
