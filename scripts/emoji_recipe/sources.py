# SPDX-License-Identifier: Apache-2.0
"""Fetches the image and text packages from npm, matches images with emoji and renders them."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from image_sets import npm
from image_sets.iconify import icon_svg
from image_sets.npm import require_npm


PACKAGES = {
    "emojibase-data": "17.0.0",
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "fluentui-emoji": "1.3.0",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/fxemoji": "1.2.2",
}
RESOLUTION = 64
WEBP_QUALITY = 90
SVG_RESOLUTION = 256

# icons that share a name with an emoji and show something else: a kissing face, a piano, a window of a desktop
_OTHER_MEANING = {"fxemoji": {"kiss", "keyboard", "window"}}


@dataclass(frozen=True)
class Emoji:
    """One emoji of emojibase. `code_points` is upper-case hexadecimal, joined by `-`, without FE0F."""

    code_points: str
    label: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    has_skin_tone: bool


@dataclass(frozen=True)
class Drawing:
    """One designer's drawing of an emoji, as its package holds it: an SVG document or a raster image file."""

    style: str
    emoji: Emoji
    data: bytes
    is_svg: bool


@dataclass(frozen=True)
class RenderedImage:
    """A rendered drawing: a WebP file, and the hash of the RGB pixels that it decodes to."""

    webp: bytes
    pixel_hash: str


def require_tools() -> None:
    """Raises `RuntimeError` that names the Debian package of the first program missing here."""
    require_npm()
    if shutil.which("rsvg-convert") is None:
        raise RuntimeError("`rsvg-convert` is not installed. On Debian: apt-get install librsvg2-bin")


def read_files(cache: Path, name: str, pattern: str) -> dict[str, bytes]:
    """Returns the files of a package of `PACKAGES` whose path below its top folder matches the regular expression."""
    return npm.read_files(npm.archive_path(cache, name, PACKAGES[name]), pattern)


def normalize_code_points(code_points: str) -> str:
    """Brings a file name such as `2764-fe0f` into the form of `Emoji.code_points`: `2764`."""
    return "-".join(point for point in code_points.upper().split("-") if point != "FE0F")


def read_emoji(cache: Path) -> dict[str, Emoji]:
    """Reads every emoji that stands in a group, skin-tone variants included, keyed by code points."""
    files = read_files(cache, "emojibase-data", r"en/(data|messages)\.json")
    messages = json.loads(files["en/messages.json"])
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    subgroups = {subgroup["order"]: subgroup["message"] for subgroup in messages["subgroups"]}
    emoji = {}
    for entry in json.loads(files["en/data.json"]):
        if "group" not in entry:
            continue
        for variant in (entry, *entry.get("skins", ())):
            code_points = normalize_code_points(variant["hexcode"])
            emoji[code_points] = Emoji(
                code_points=code_points,
                label=variant["label"].lower(),
                keywords=tuple(tag.lower() for tag in variant.get("tags", entry.get("tags", ()))),
                group=groups[entry["group"]].lower(),
                subgroup=subgroups[entry["subgroup"]].lower(),
                has_skin_tone="tone" in variant,
            )
    return emoji


def read_drawings(cache: Path, skin_tones: bool = False) -> Iterator[Drawing]:
    """
    Matches the packages' images with emoji.

    Args:
        cache: the folder of the packages' archives.
        skin_tones: also yields the skin-tone variants.
    """
    emoji = {
        code_points: item for code_points, item in read_emoji(cache).items() if skin_tones or not item.has_skin_tone
    }
    raster = (
        ("noto", "emoji-datasource-google", r"img/google/64/.+\.png"),
        ("twemoji", "emoji-datasource-twitter", r"img/twitter/64/.+\.png"),
        ("fluent 3d", "@lobehub/fluent-emoji-3d", r"assets/.+\.webp"),
    )
    for style, package, pattern in raster:
        for path, data in sorted(read_files(cache, package, pattern).items()):
            item = emoji.get(normalize_code_points(Path(path).stem))
            # Microsoft publishes no flags of places, so the origin of those in the fluent package is unknown
            if item is not None and not (style == "fluent 3d" and is_flag_of_place(item)):
                yield Drawing(style, item, data, is_svg=False)
    yield from _fluent_svg_drawings(cache, emoji)
    for style, package in (
        ("noto v1", "@iconify-json/noto-v1"),
        ("emojione", "@iconify-json/emojione"),
        ("fxemoji", "@iconify-json/fxemoji"),
    ):
        yield from _iconify_drawings(cache, emoji, style, package)


def is_flag_of_place(emoji: Emoji) -> bool:
    """Tells whether an emoji is the flag of a country or of a part of one (not, say, the chequered flag)."""
    points = [int(point, 16) for point in emoji.code_points.split("-")]
    return any(0x1F1E6 <= point <= 0x1F1FF or 0xE0020 <= point <= 0xE007F for point in points)


def label_slug(label: str) -> str:
    """Writes a label the way that icon packages name files: `"man’s shoe"` becomes `mans-shoe`."""
    plain = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "").replace(".", "")).strip("-")


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


def _iconify_drawings(cache, emoji, style, package):
    icon_set = json.loads(read_files(cache, package, r"icons\.json")["icons.json"])
    icons = dict(icon_set["icons"])
    for alias, target in icon_set.get("aliases", {}).items():
        # an alias with more keys turns or mirrors its parent
        if set(target) == {"parent"} and target["parent"] in icons:
            icons[alias] = icons[target["parent"]]
    slugs = {code_points: _iconify_slug(item.label, style) for code_points, item in emoji.items()}
    uses = Counter(slugs.values())
    for code_points, slug in slugs.items():
        # `keycap: #` and `keycap: *` have the same slug: no telling which of them the icon shows
        if slug in icons and uses[slug] == 1 and slug not in _OTHER_MEANING.get(style, ()):
            yield Drawing(style, emoji[code_points], icon_svg(icon_set, icons[slug]).encode(), is_svg=True)


def _iconify_slug(label, style):
    slug = label_slug(label)
    if style == "emojione":
        return re.sub(r"^flag-", "flag-for-", slug)
    return slug.replace("-", "") if style == "fxemoji" else slug


def render(drawing: Drawing) -> RenderedImage:
    """
    Renders a drawing: SVG at 256 pixels, padded to a square, composited on white, scaled to 64x64 pixels (Lanczos),
    stored as WebP.
    """
    data = drawing.data
    if drawing.is_svg:
        size = str(SVG_RESOLUTION)
        command = ["rsvg-convert", "--keep-aspect-ratio", "--width", size, "--height", size]
        result = subprocess.run(command, input=data, capture_output=True)
        if result.returncode != 0:
            name = f"{drawing.style}: {drawing.emoji.label}"
            raise RuntimeError(f"rsvg-convert cannot draw {name!r}: {result.stderr.decode(errors='replace').strip()}")
        data = result.stdout
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    square = square.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    square.save(buffer, format="WEBP", quality=WEBP_QUALITY, method=4)
    stored = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    return RenderedImage(buffer.getvalue(), hashlib.sha256(stored.tobytes()).hexdigest())
