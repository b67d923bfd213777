# SPDX-License-Identifier: Apache-2.0
"""What the model and the folders beside it raise where an input is wrong."""


class InputError(ValueError):
    """An argument, a file or a field of one is wrong; the message names it, its value and the cause.

    `moma` shows it in one line, a server as a bad request. Any other `ValueError` is a defect and keeps its traceback.
    """


EACH_DEVICE = (
    "start one process for each device with torchrun, or show this one a single device (CUDA_VISIBLE_DEVICES=0)."
)
