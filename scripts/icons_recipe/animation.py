# SPDX-License-Identifier: Apache-2.0
"""Brings animated drawings to a stand, because a renderer shows their first moment, in which parts are missing."""

from xml.etree import ElementTree


_SVG = "{http://www.w3.org/2000/svg}"
ElementTree.register_namespace("", _SVG.strip("{}"))
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def settle(document: str) -> str:
    """
    Gives every animated attribute of an SVG document the value of one moment.

    An animation that ends and stays (`fill="freeze"`) gives its last value. One that goes on for ever gives the middle
    one of its values: drops of rain are invisible at both ends of their fall. Movements are left at their start.

    Args:
        document: an SVG document. One without animations comes back as it is.
    """
    if "<animate" not in document and "<set" not in document:
        return document
    root = ElementTree.fromstring(document)
    for element in list(root.iter()):
        for change in [child for child in element if child.tag in (f"{_SVG}animate", f"{_SVG}set")]:
            attribute, value = change.get("attributeName"), _value(change)
            if attribute is not None and value is not None:
                element.set(attribute, value)
            element.remove(change)
    return ElementTree.tostring(root, encoding="unicode")


def _value(change):
    values = change.get("values", "").split(";")
    stays = change.get("fill") == "freeze" or change.tag == f"{_SVG}set"
    if values == [""]:
        return change.get("to") if stays else None
    return values[-1] if stays else values[len(values) // 2]
