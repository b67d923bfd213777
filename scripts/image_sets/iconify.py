# SPDX-License-Identifier: Apache-2.0
"""Reads drawings out of a set in Iconify's JSON format."""


def icon_svg(icon_set: dict, icon: dict, size: int | None = None) -> str:
    """
    Returns an icon as an SVG document.

    Args:
        icon_set: the set, which holds what its icons leave unsaid.
        icon: an entry of the set's `icons`.
        size: pixels of both sides; the drawing is fitted into their middle. By default the icon's own sides.
    """
    left, top, width, height = (
        icon.get(key, icon_set.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size or width}" height="{size or height}" viewBox="{left} {top} {width} {height}">'
        f"{icon['body']}</svg>"
    )
