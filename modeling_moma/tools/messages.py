# SPDX-License-Identifier: Apache-2.0
"""Messages for people at a terminal."""


def one_line(error: object, most: int | None = None) -> str:
    """
    What an error says, in one line.

    Args:
        error: or any text.
        most: characters; the rest is left out.
    """
    return " ".join(str(error).split())[:most]


__all__ = ["one_line"]
