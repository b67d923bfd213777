# SPDX-License-Identifier: Apache-2.0
"""Old names of functions and methods, which warn with the new name for one release."""

import functools
import warnings
from collections.abc import Callable


def renamed(old: str, new: Callable) -> Callable:
    """Make a function or a method callable by its old name, with a `FutureWarning` that says the new one.

    Args:
        old (`str`):
            The old name.
        new (`Callable`):
            The function of the new name.

    Returns:
        `Callable`: takes the arguments of `new` and returns what it returns.
    """

    @functools.wraps(new)
    def call(*args, **kwargs):
        warnings.warn(
            f"`{old}` is `{new.__name__}` now; the old name goes with the next release.", FutureWarning, stacklevel=2
        )
        return new(*args, **kwargs)

    call.__name__ = old
    call.__doc__ = f"The old name of `{new.__name__}`."
    return call


__all__ = ["renamed"]
