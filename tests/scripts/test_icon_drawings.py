# SPDX-License-Identifier: Apache-2.0
"""Rendering, painting and settling of icons, near-identical drawings, and families that draw alike."""

import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from image_sets import groups
from image_sets import icon_images as drawing
from image_sets.groups import HeldOutEmoji, linked_groups, merge_alike, near_pairs
from image_sets.icon_images import settle
from image_sets.icon_rows import Row
from image_sets.icon_sets import maker_family
from image_sets.packages import ICONIFY, archive_path


pytest.importorskip("resvg_py")
SQUARE = {"body": '<path fill="currentColor" d="M6 6h12v12H6z"/>', "width": 24, "height": 24}
ICON_SET = {"prefix": "some-set", "icons": {"square": SQUARE, "gone": SQUARE | {"hidden": True}}}


def test_icons_are_drawn_in_black_in_the_middle_of_white():
    pixels = drawing.render_icon(ICON_SET, SQUARE)
    assert pixels.shape == (64, 64, 3)
    assert pixels[32, 32].tolist() == [0, 0, 0]
    assert pixels[4, 32].tolist() == [255, 255, 255]
    wide = drawing.render_icon(ICON_SET, SQUARE | {"width": 48, "left": -12})
    assert wide[32, 32].tolist() == [0, 0, 0]
    assert (wide == 0).sum() == pytest.approx((pixels == 0).sum() / 4, rel=0.1)


@pytest.mark.parametrize("colour", sorted(drawing.COLOURS))
def test_small_grey_is_that_of_the_black_drawing_whatever_the_colour(colour):
    black = drawing.render_icon(ICON_SET, SQUARE)
    stored = drawing.decode(drawing.encode(drawing.paint(black, colour)))
    difference = drawing.small_grey(stored, colour).astype(int) - drawing.small_grey(black, "black")
    assert np.abs(difference).mean() < 4


def test_colours_depend_on_set_and_name_alone_and_a_third_is_black():
    colours = [drawing.choose_colour("some-set", f"icon-{number}") for number in range(3000)]
    assert colours == [drawing.choose_colour("some-set", f"icon-{number}") for number in range(3000)]
    assert set(colours) == set(drawing.COLOURS)
    assert colours.count("black") / 3000 == pytest.approx(1 / 3, abs=0.03)


def test_animations_end_or_stand_in_their_middle():
    document = (
        '<svg xmlns="http://www.w3.org/2000/svg"><g><path opacity="0"><animate attributeName="opacity" '
        'values="0;1;0"/></path><path><animate fill="freeze" attributeName="stroke-dashoffset" values="60;0"/>'
        '<set attributeName="r" to="3"/></path></g></svg>'
    )
    settled = settle(document)
    assert "<animate" not in settled and "<set" not in settled
    assert 'opacity="1"' in settled and 'stroke-dashoffset="0"' in settled and 'r="3"' in settled
    assert settle("<svg/>") == "<svg/>"


def make_archive(cache, documents):
    with tarfile.open(archive_path(cache, ICONIFY), "w:gz") as archive:
        for prefix, document in documents.items():
            data = json.dumps(document).encode()
            member = tarfile.TarInfo(f"package/json/{prefix}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_sets_are_rendered_once_without_withdrawn_icons_and_equal_again(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for cache in (first, second):
        cache.mkdir()
        make_archive(cache, {"some-set": ICON_SET, "other": ICON_SET | {"prefix": "other"}})
        drawing.render_sets(cache, {"some-set": {}, "other": {"palette": True}}, 2)

    def rendered(cache, prefix):
        return pq.read_table(drawing.rendered_folder(cache) / f"{prefix}.parquet").to_pylist()

    row, again = (rendered(cache, "some-set") for cache in (first, second))
    assert row == again
    assert [item["icon"] for item in row] == ["square"]
    assert row[0]["colour"] == drawing.choose_colour("some-set", "square")
    assert Image.open(io.BytesIO(row[0]["webp"])).size == (64, 64)
    assert [item["colour"] for item in rendered(first, "other")] == [None]

    path = drawing.rendered_folder(first) / "some-set.parquet"
    kept = path.stat().st_mtime_ns
    (drawing.rendered_folder(first) / "other.parquet").unlink()
    drawing.render_sets(first, {"some-set": {}, "other": {"palette": True}}, 1)
    assert path.stat().st_mtime_ns == kept
    assert pq.read_metadata(path.with_name("other.parquet")).num_rows == 1


def test_near_pairs_are_those_of_the_plain_loop():
    generator = np.random.default_rng(0)
    base = generator.integers(0, 256, (40, 256))
    # copies at distances on both sides of the limit
    noise = generator.integers(-14, 15, (700, 256)) * generator.uniform(0, 1.5, (700, 1))
    greys = (base[generator.integers(0, 40, 700)] + noise).clip(0, 255).astype(np.uint8)
    wide = greys.astype(int)
    expected = [(i, j) for i in range(700) for j in range(i + 1, 700) if np.abs(wide[i] - wide[j]).sum() < 6 * 256]
    assert len(expected) > 1000
    assert near_pairs(greys).tolist() == sorted(map(list, expected))


def make_row(icon, name, family, grey, prefix="some-set"):
    values = grey.astype(np.uint8).tobytes()
    lists = {"aliases": (), "keywords": (), "categories": ()}
    said = {"set": prefix, "icon": icon, "name": name, "family": family, "style": "", "license": "MIT"}
    return Row(**said, **lists, colour=None, image=b"", grey=values, stored_grey=values, hash=icon)


def test_blank_and_emoji_images_are_dropped_with_their_cell_and_the_rest_is_grouped(tmp_path):
    generator = np.random.default_rng(1)
    a, b, c, d, held, trained = generator.integers(0, 200, (6, 256))
    rows = [
        make_row("a", "house", "x", a),
        make_row("a-close", "home", "y", a + 5),
        make_row("b", "house", "x", b),
        make_row("c", "home", "z", c),
        make_row("white", "home", "z", np.full(256, 255)),
        make_row("d", "castle", "x", d),
        make_row("held", "castle", "x", held + 5),
        make_row("trained", "hand", "x", trained + 5),
        make_row("wave", "wave", "twemoji", d, prefix="twemoji"),
        make_row("tower", "tower", "twemoji", c, prefix="twemoji"),
    ]
    emoji = HeldOutEmoji(frozenset(), held[None].astype(np.uint8), trained[None].astype(np.uint8), ())
    for _ in range(2):
        found = groups.drop_and_group(rows, {"twemoji": {"wave"}}, emoji, tmp_path)
        assert [row.icon for row in found.rows] == ["a", "a-close", "b", "c", "trained", "tower"]
        assert found.groups.tolist() == [0, 0, 0, 3, 4, 3]
        assert found.stays.tolist() == [False, False, False, False, True, True]
        assert found.pairs.tolist() == [[0, 1], [3, 5]]
        assert found.dropped[groups.BLANK] == found.dropped[groups.EMOJI_CELL] == 1
        assert found.dropped[groups.EMOJI_IMAGE] == 2


def test_groups_are_named_by_their_smallest_member_in_any_order():
    links = [(5, 3), (3, 1), (4, 4), (7, 6)]
    assert linked_groups(8, links).tolist() == linked_groups(8, links[::-1]).tolist() == [0, 1, 2, 1, 4, 1, 6, 6]


def test_families_are_makers_and_merge_only_above_the_share():
    assert maker_family("mdi") == maker_family("ic") == "material"
    assert maker_family("streamline-freehand-color") != maker_family("streamline-plump") == maker_family("streamline")
    families = [family for family in ("x", "y", "z") for _ in range(60)]
    names = [f"name {number}" for _ in range(3) for number in range(60)]
    alike_xy = [(number, 60 + number) for number in range(19)]
    alike_xz = [(number, 120 + number) for number in range(18)]
    merged = merge_alike(families, names, np.array([*alike_xy, *alike_xz, (0, 61)]))
    assert merged == {"x": "x", "y": "x", "z": "z"}
