# SPDX-License-Identifier: Apache-2.0
"""What the model and the folders beside it raise where an input is wrong."""


class InputError(ValueError):
    """
    What the caller gave is wrong: an argument, a file, a field of one. The message names it, its value and the cause.

    `moma` shows it in one line, a server as a bad request. Any other `ValueError` is a defect and keeps its traceback.
    """


__all__ = ["InputError"]
