# SPDX-License-Identifier: Apache-2.0
"""A contact sheet: real images, their reconstructions, what the model drew, and the captions of both."""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont


IMAGE_SIDE = 128
GAP = 8
MARGIN = 24
COLUMNS = 3
FONT_SIZE = 15
LINE_HEIGHT = 20
HEADS = ("real", "reconstructed", "drawn")
BACKGROUND, TEXT_COLOR, FAINT_COLOR = "white", "#1a1a1a", "#767676"
# quotation marks that stand in labels
QUOTATION_MARKS = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


class SheetEntry(NamedTuple):
    """What the sheet shows of one held-out image.

    Attributes:
        real: the image of the data set.
        reconstructed: the same through the image tokenizer and back, the ceiling of `drawn`.
        drawn: what the model drew from the caption.
        caption: the true caption.
        model_caption: what the model said about the real image.
    """

    real: Image.Image
    reconstructed: Image.Image
    drawn: Image.Image
    caption: str
    model_caption: str


def printable(text: str) -> str:
    """Replaces what Pillow's built-in font lacks: accents go, other characters become `?`, line ends become spaces."""
    folded = unicodedata.normalize("NFKD", " ".join(text.split()).translate(QUOTATION_MARKS))
    kept = (character for character in folded if not unicodedata.combining(character))
    return "".join(character if character.isascii() and character.isprintable() else "?" for character in kept)


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Breaks a text into lines of so many pixels at most; a word that is longer is cut."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def draw_contact_sheet(entries: Sequence[SheetEntry], columns: int = COLUMNS) -> Image.Image:
    """Draws one card for each entry, so many in a row: the three images side by side, the two captions beneath."""
    columns = min(columns, len(entries))
    font = ImageFont.load_default(FONT_SIZE)
    card_width = 3 * IMAGE_SIDE + 2 * GAP
    captions = [_caption_lines(entry, font, card_width) for entry in entries]
    rows = range(0, len(entries), columns)
    # the cards of a row are as high as the longest captions in it
    heights = [
        LINE_HEIGHT + IMAGE_SIDE + GAP + LINE_HEIGHT * max(map(len, captions[start : start + columns]))
        for start in rows
    ]
    size = (columns * card_width + (columns + 1) * MARGIN, sum(heights) + (len(heights) + 1) * MARGIN)
    sheet = Image.new("RGB", size, BACKGROUND)
    top = MARGIN
    for start, height in zip(rows, heights, strict=True):
        for column, entry in enumerate(entries[start : start + columns]):
            left = MARGIN + column * (card_width + MARGIN)
            _draw_card(sheet, left, top, entry, captions[start + column], font)
        top += height + MARGIN
    return sheet


def _caption_lines(entry, font, width):
    """Lines with their colour, the true caption first."""
    truth = wrap_text(printable(f"true:  {entry.caption}"), font, width)
    model = wrap_text(printable(f"model:  {entry.model_caption or '(nothing)'}"), font, width)
    return [(line, FAINT_COLOR) for line in truth] + [(line, TEXT_COLOR) for line in model]


def _draw_card(sheet, left, top, entry, lines, font):
    pen = ImageDraw.Draw(sheet)
    images = (entry.real, entry.reconstructed, entry.drawn)
    for place, (head, image) in enumerate(zip(HEADS, images, strict=True)):
        x = left + place * (IMAGE_SIDE + GAP)
        pen.text((x, top), head, fill=FAINT_COLOR, font=font)
        enlarged = image.convert("RGB").resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (x, top + LINE_HEIGHT))
    y = top + LINE_HEIGHT + IMAGE_SIDE + GAP
    for number, (line, color) in enumerate(lines):
        pen.text((left, y + number * LINE_HEIGHT), line, fill=color, font=font)
