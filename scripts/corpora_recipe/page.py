# SPDX-License-Identifier: Apache-2.0
"""Reads an HTML page of a DocBook manual as text and images that alternate."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from lxml import html


# navigation, tables of contents, the index, entries of the bibliography
_SKIPPED_CLASSES = {"navheader", "navfooter", "toc", "index", "indexterm", "biblioentry"}
_SKIPPED_TAGS = {"head", "script", "style", "hr", "colgroup"}
_ADMONITIONS = {"note", "tip", "warning", "caution", "important"}
_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
_BLOCKS = {"div", "p", "dl", "ul", "ol", "table", "blockquote", "pre", "body", *_HEADINGS}
_LINES = {"li", "dt", "dd", "tr"}
# what stands for the spaces and ends of lines of program text until the others are settled; no HTML holds them
_KEPT_SPACE, _KEPT_LINE = "\x1e", "\x1f"


@dataclass(frozen=True)
class Page:
    """A page: its title and its segments, `{"type": "text", "text": ...}` or `{"type": "image", "image": ...}`."""

    title: str
    segments: list[dict]
    has_text: bool


def read_page(data: bytes, image: Callable[[str], str | None]) -> Page:
    """
    Reads a page in the order in which it is read by people. Navigation, marks of footnotes, the bibliography and the
    signs of notes and tips are left out. Texts that no image parts are one segment, with an empty line between its
    paragraphs.

    Args:
        data: the page, HTML in UTF-8.
        image: the path to write for the `src` of an image, or None to leave the image out.

    Returns:
        The page. `has_text` is False where it has nothing but headings.
    """
    root = html.document_fromstring(data, parser=html.HTMLParser(encoding="utf-8"))
    reader = _Reader(image)
    body = root.find("body")
    if body is not None:
        reader.read(body, _Place())
    reader.end_text()
    return Page(" ".join((root.findtext("head/title") or "").split()), reader.segments, reader.has_text)


@dataclass(frozen=True)
class _Place:
    """What an element stands in."""

    in_heading: bool = False
    in_item: bool = False
    in_admonition: bool = False
    in_program: bool = False


@dataclass
class _Reader:
    image: Callable[[str], str | None]
    segments: list[dict] = field(default_factory=list)
    has_text: bool = False
    _text: str = ""
    # ends of lines that are due, and the mark of a list item, once text comes
    _gap: int = 0
    _mark: str = ""

    def read(self, element, place: _Place) -> None:
        tag = element.tag
        # comments have a function for a tag
        if not isinstance(tag, str) or tag in _SKIPPED_TAGS or _classes(element) & _SKIPPED_CLASSES:
            return
        if _is_reference(element):
            # a full stop or a comma may follow
            self._text = self._text.rstrip(" ")
            return
        if tag == "img":
            self._add_image(element, place)
            return
        if tag == "br":
            self._gap = max(self._gap, 1)
            return
        gap = self._gap_around(tag, place)
        self._gap = max(self._gap, gap)
        if tag == "li":
            self._mark = _mark_of(element)
        inner = _Place(
            in_heading=place.in_heading or tag in _HEADINGS,
            in_item=place.in_item or tag in {"li", "dd", "td", "th"},
            in_admonition=(place.in_admonition or bool(_classes(element) & _ADMONITIONS)),
            in_program=place.in_program or tag == "pre" or "literallayout" in _classes(element),
        )
        self._add(element.text, inner)
        for child in element:
            if tag == "tr" and not place.in_admonition and child.getprevious() is not None and not self._gap:
                self._text += " | "
            self.read(child, inner)
            # between the cells of a row stands nothing but layout
            if tag != "tr":
                self._add(child.tail, inner)
        # what is defined stands right below its term
        self._gap = max(self._gap, 1 if tag == "dt" else gap)

    def end_text(self) -> None:
        """Ends the segment of text, if one was begun."""
        text = re.sub(r" *\n *", "\n", re.sub(r"[ \t]+", " ", self._text)).strip()
        # a program's empty first and last lines are layout
        text = re.sub(f"(?<=\n)({_KEPT_SPACE}*{_KEPT_LINE})+|({_KEPT_LINE}{_KEPT_SPACE}*)+(?=\n|$)", "", text)
        text = text.replace(_KEPT_SPACE, " ").replace(_KEPT_LINE, "\n").strip("\n")
        if text:
            self.segments.append({"type": "text", "text": text})
        self._text, self._gap, self._mark = "", 0, ""

    def _add(self, text: str | None, place: _Place) -> None:
        if not text:
            return
        if not text.strip():
            self._text += "" if self._gap else " "
            return
        if self._gap and self._text.strip():
            self._text += "\n" * self._gap
        self._text += self._mark
        self._gap, self._mark = 0, ""
        self.has_text = self.has_text or not place.in_heading
        if place.in_program:
            self._text += text.replace(" ", _KEPT_SPACE).replace("\n", _KEPT_LINE)
        else:
            self._text += re.sub(r"\s+", " ", text)

    def _add_image(self, element, place: _Place) -> None:
        # the image of a note is a sign in the margin, the same each time
        is_sign = place.in_admonition and (element.get("alt") or "").startswith("[")
        path = None if is_sign else self.image(element.get("src") or "")
        if path is not None:
            self.end_text()
            self.segments.append({"type": "image", "image": path})

    def _gap_around(self, tag: str, place: _Place) -> int:
        if tag in _LINES or (place.in_admonition and tag in {"td", "th"}):
            return 2 if tag == "dt" and not place.in_item else 1
        if tag not in _BLOCKS:
            return 0
        return 1 if place.in_item else 2


def _is_reference(element) -> bool:
    """Tells `[WKPD-LZW]` in a text, and `[4]` at a footnote and at what it belongs to, from other links."""
    if element.tag != "a":
        return False
    classes = _classes(element)
    is_entry = "xref" in classes and (element.get("href") or "").startswith("bibliography.html")
    return is_entry or bool(classes & {"footnote", "para"})


def _classes(element) -> set[str]:
    return set((element.get("class") or "").split())


def _mark_of(item) -> str:
    parent = item.getparent()
    if parent.tag != "ol":
        return "- "
    start = parent.get("start") or "1"
    before = sum(1 for _ in item.itersiblings("li", preceding=True))
    return f"{(int(start) if start.isdecimal() else 1) + before}. "
