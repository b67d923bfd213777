# SPDX-License-Identifier: Apache-2.0
"""Emoji: their labels by emojibase, what packages draw of them, and which images show the same drawing."""

import hashlib
import io
import json
import re
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from image_sets.packages import icon_svg, read_files


# families of styles that share one drawing
FAMILIES = {
    "noto": "noto",
    "twemoji": "twemoji",
    "fluent 3d": "fluent",
    "fluent flat": "fluent",
    "fluent": "fluent",
    "noto v1": "noto v1",
    "emojione": "emojione",
    "fxemoji": "fxemoji",
}
SKIN_TONE = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")
RESOLUTION, WEBP_QUALITY, SVG_RESOLUTION = 64, 90, 256

_RASTER = (
    ("noto", "emoji-datasource-google", r"img/google/64/.+\.png"),
    ("twemoji", "emoji-datasource-twitter", r"img/twitter/64/.+\.png"),
    ("fluent 3d", "@lobehub/fluent-emoji-3d", r"assets/.+\.webp"),
)
# icons that share a name with an emoji and show something else: a kissing face, a piano, a window of a desktop
_OTHER_MEANING = {"fxemoji": {"kiss", "keyboard", "window"}}


class Emoji(NamedTuple):
    """One emoji. `code_points` is upper-case hexadecimal, joined by `-`, without FE0F."""

    code_points: str
    label: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    has_skin_tone: bool


class Drawing(NamedTuple):
    """One designer's drawing of an emoji, as its package holds it: an SVG document or a raster image file."""

    style: str
    emoji: Emoji
    data: bytes
    is_svg: bool


def normalize_code_points(code_points: str) -> str:
    """Brings a file name such as `2764-fe0f` into the form of `Emoji.code_points`: `2764`."""
    return "-".join(point for point in code_points.upper().split("-") if point != "FE0F")


def label_slug(label: str) -> str:
    """Writes a label the way that icon packages name files: `"man’s shoe"` becomes `mans-shoe`."""
    plain = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "").replace(".", "")).strip("-")


def iconify_slug(label: str, prefix: str) -> str:
    """As `label_slug`, as one of Iconify's sets spells it."""
    slug = label_slug(label)
    if prefix.startswith("emojione"):
        return re.sub(r"^flag-", "flag-for-", slug)
    return slug.replace("-", "") if prefix == "fxemoji" else slug


def base_label(label: str) -> str:
    """A label without its skin tones: `"waving hand: dark skin tone"` becomes `"waving hand"`."""
    name, colon, rest = label.partition(": ")
    if not colon:
        return label
    details = [detail for detail in rest.split(", ") if not SKIN_TONE.fullmatch(detail)]
    # a couple of two tones spells out the persons that the plain label leaves unsaid
    if details == ["person", "person"] and SKIN_TONE.search(rest):
        return name
    return f"{name}: {', '.join(details)}" if details else name


def drawing_cell(label: str, style: str) -> tuple[str, str]:
    """The (base label, family) cell of an image: images of one cell show the same drawing."""
    return base_label(label), FAMILIES[style]


def read_emoji(cache: Path) -> dict[str, Emoji]:
    """Every emoji that stands in a group, skin-tone variants included, by code points."""
    files = read_files(cache, "emojibase-data", r"en/(data|messages)\.json")
    messages = json.loads(files["en/messages.json"])
    groups, subgroups = (
        {entry["order"]: entry["message"].lower() for entry in messages[kind]} for kind in ("groups", "subgroups")
    )
    emoji = {}
    for entry in json.loads(files["en/data.json"]):
        for variant in (entry, *entry.get("skins", ())) if "group" in entry else ():
            code_points = normalize_code_points(variant["hexcode"])
            emoji[code_points] = Emoji(
                code_points=code_points,
                label=variant["label"].lower(),
                keywords=tuple(tag.lower() for tag in variant.get("tags", entry.get("tags", ()))),
                group=groups[entry["group"]],
                subgroup=subgroups[entry["subgroup"]],
                has_skin_tone="tone" in variant,
            )
    return emoji


def read_drawings(cache: Path) -> Iterator[Drawing]:
    """Matches the packages' images with emoji that have no skin tone."""
    emoji = {code_points: item for code_points, item in read_emoji(cache).items() if not item.has_skin_tone}
    for style, package, pattern in _RASTER:
        for path, data in sorted(read_files(cache, package, pattern).items()):
            item = emoji.get(normalize_code_points(Path(path).stem))
            # Microsoft publishes no flags of places, so the origin of those in the fluent package is unknown
            if item is not None and not (style == "fluent 3d" and is_flag_of_place(item)):
                yield Drawing(style, item, data, is_svg=False)
    yield from _fluent_svg_drawings(cache, emoji)
    for style in ("noto v1", "emojione", "fxemoji"):
        yield from _iconify_drawings(cache, emoji, style)


def is_flag_of_place(emoji: Emoji) -> bool:
    """Whether an emoji is the flag of a country or of a part of one (not, say, the chequered flag)."""
    points = [int(point, 16) for point in emoji.code_points.split("-")]
    return any(0x1F1E6 <= point <= 0x1F1FF or 0xE0020 <= point <= 0xE007F for point in points)


def _fluent_svg_drawings(cache, emoji):
    characters = json.loads(read_files(cache, "@iconify-json/fluent-emoji-flat", r"chars\.json")["chars.json"])
    names = {normalize_code_points(code_points): name for code_points, name in characters.items()}
    files = read_files(cache, "fluentui-emoji", r"icons/(flat|modern)/.+\.svg")
    for style, folder in (("fluent flat", "flat"), ("fluent", "modern")):
        for code_points, item in emoji.items():
            name = names.get(code_points, label_slug(item.label))
            # the package names the yellow drawing of an emoji with skin tones `NAME-default`
            for path in (f"icons/{folder}/{name}.svg", f"icons/{folder}/{name}-default.svg"):
                if path in files:
                    yield Drawing(style, item, files[path], is_svg=True)
                    break


def _iconify_drawings(cache, emoji, style):
    package = f"@iconify-json/{style.replace(' ', '-')}"
    icon_set = json.loads(read_files(cache, package, r"icons\.json")["icons.json"])
    icons = dict(icon_set["icons"])
    for alias, target in icon_set.get("aliases", {}).items():
        # an alias with more keys turns or mirrors its parent
        if set(target) == {"parent"} and target["parent"] in icons:
            icons[alias] = icons[target["parent"]]
    slugs = {code_points: iconify_slug(item.label, style) for code_points, item in emoji.items()}
    uses = Counter(slugs.values())
    for code_points, slug in slugs.items():
        # `keycap: #` and `keycap: *` have the same slug: no telling which of them the icon shows
        if slug in icons and uses[slug] == 1 and slug not in _OTHER_MEANING.get(style, ()):
            yield Drawing(style, emoji[code_points], icon_svg(icon_set, icons[slug]).encode(), is_svg=True)


def render(drawing: Drawing) -> tuple[bytes, str]:
    """A drawing in the middle of a white square of 64 pixels, as a WebP file, and the hash of the pixels in it."""
    data = drawing.data
    if drawing.is_svg:
        size = str(SVG_RESOLUTION)
        command = ["rsvg-convert", "--keep-aspect-ratio", "--width", size, "--height", size]
        data = subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    square = square.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    square.save(buffer, format="WEBP", quality=WEBP_QUALITY, method=4)
    stored = Image.open(buffer).convert("RGB")
    return buffer.getvalue(), hashlib.sha256(stored.tobytes()).hexdigest()
