# SPDX-License-Identifier: Apache-2.0
"""What processor and image tokenizer raise where an input is wrong."""


class InputError(ValueError):
    """What the caller gave is wrong, as the message says with the argument's name and value.

    `modeling_moma` has an `InputError` of its own, since neither of the two packages imports the other on the Hub.
    """
