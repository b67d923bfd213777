# SPDX-License-Identifier: Apache-2.0

import pytest
from PIL import Image, ImageFont

from sheet import GAP, IMAGE_SIDE, LINE_HEIGHT, MARGIN, SheetEntry, draw_contact_sheet, printable, wrap_text


COLORS = ("red", "lime", "blue")


def entry(caption="noto: red apple", model_caption="noto: tomato"):
    return SheetEntry(*(Image.new("RGB", (64, 64), color) for color in COLORS), caption, model_caption)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (13, 3, 5)])
def test_every_entry_has_its_card_with_the_three_images_in_order(count, columns, rows):
    sheet = draw_contact_sheet([entry() for _ in range(count)])
    card = (3 * IMAGE_SIDE + 2 * GAP, LINE_HEIGHT + IMAGE_SIDE + GAP + 2 * LINE_HEIGHT)
    assert sheet.size == (columns * (card[0] + MARGIN) + MARGIN, rows * (card[1] + MARGIN) + MARGIN)
    left = MARGIN + (count - 1) % columns * (card[0] + MARGIN)
    top = MARGIN + (rows - 1) * (card[1] + MARGIN) + LINE_HEIGHT
    centres = [left + place * (IMAGE_SIDE + GAP) + IMAGE_SIDE // 2 for place in range(3)]
    expected = [Image.new("RGB", (1, 1), color).getpixel((0, 0)) for color in COLORS]
    assert [sheet.getpixel((x, top + IMAGE_SIDE // 2)) for x in centres] == expected


def test_captions_are_written_and_a_long_one_makes_room():
    short, other, long = (
        draw_contact_sheet([entry(model_caption=text)]) for text in ("noto: tomato", "noto: hat", "noto: apple " * 20)
    )
    assert short.size == other.size and short.tobytes() != other.tobytes()
    assert long.height > short.height


def test_lines_are_no_wider_than_asked_and_lose_no_letter():
    font = ImageFont.load_default(15)
    text = "fluent: man in steamy room with an extraordinarily" + "y" * 80 + " long word"
    lines = wrap_text(text, font, 120)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert wrap_text("", font, 120) == [""]


def test_characters_that_the_font_lacks_are_replaced():
    assert printable("flag: São Tomé &\nPríncipe") == "flag: Sao Tome & Principe"
    assert printable("woman\u2019s \u201chat\u201d \U0001f452") == 'woman\'s "hat" ?'
