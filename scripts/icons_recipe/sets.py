# SPDX-License-Identifier: Apache-2.0
"""Which of Iconify's sets and icons are taken."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from image_sets.npm import archive_path, fetch_packages, read_files


ICONIFY = "@iconify/json"
PACKAGES = {
    ICONIFY: "2.2.535",
    "lucide-static": "1.62.0",
    "@tabler/icons": "3.52.0",
    "@fortawesome/fontawesome-free": "7.3.1",
    "@carbon/icons": "11.89.0",
    "@phosphor-icons/core": "2.1.1",
    "ionicons": "8.1.0",
    "@mdi/svg": "7.4.47",
    "emojibase-data": "17.0.0",
}
LICENSES = frozenset(
    ("MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-3.0", "CC0-1.0", "OFL-1.1", "ISC", "Unlicense", "BSD-3-Clause")
)

# marks of companies and projects outside Iconify's category of logos
_BRANDS = frozenset(
    (
        "academicons",
        "catppuccin",
        "devicon",
        "devicon-plain",
        "fa-brands",
        "fa6-brands",
        "file-icons",
        "gcp",
        "k8s",
        "material-icon-theme",
        "skill-icons",
        "unjs",
        "vscode-icons",
    )
)
# draws what the set `solar` draws, under another licence
_COPIES = frozenset(("reicon",))


def fetch_archives(cache: Path, on_done=lambda name: None) -> None:
    """Downloads every package of `PACKAGES` into `cache`. Archives already there are kept."""
    fetch_packages(cache, PACKAGES, on_done)


def is_taken(prefix: str, info: dict) -> bool:
    """Tells whether a set is permissively licensed, not deprecated, not of brands, and no copy of another set.

    Args:
        prefix: Iconify's short name of the set, such as `"tabler"`.
        info: the set's entry in Iconify's `collections.json`.
    """
    return (
        info["license"].get("spdx") in LICENSES
        and not info.get("hidden")
        and not _is_of_brands(prefix, info)
        and prefix not in _COPIES
    )


def read_collections(cache: Path) -> dict[str, dict]:
    """Returns Iconify's entry (name, author, license, palette, ...) of every set that is taken, in order of prefix."""
    return {prefix: info for prefix, info in sorted(_read_all(cache).items()) if is_taken(prefix, info)}


def read_brand_names(cache: Path) -> frozenset[str]:
    """Returns the words that are names of icons in the sets of brands and logos, such as `"github"`."""
    brands = [prefix for prefix, info in _read_all(cache).items() if _is_of_brands(prefix, info)]
    slugs = (slug for _, document in read_set_files(cache, brands) for slug in json.loads(document)["icons"])
    return frozenset(slug for slug in slugs if slug.isalpha())


def _read_all(cache):
    files = read_files(archive_path(cache, ICONIFY, PACKAGES[ICONIFY]), r"collections\.json")
    return json.loads(files["collections.json"])


def _is_of_brands(prefix, info):
    return info.get("category") == "Logos" or prefix in _BRANDS


def read_set_files(cache: Path, prefixes: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yields prefix and JSON document of each named set, one after the other, as the archive holds them."""
    wanted = "|".join(re.escape(prefix) for prefix in sorted(prefixes))
    if not wanted:
        return
    files = read_files(archive_path(cache, ICONIFY, PACKAGES[ICONIFY]), rf"json/({wanted})\.json")
    for path, document in sorted(files.items()):
        yield Path(path).stem, document


def visible_icons(icon_set: dict) -> dict[str, dict]:
    """Returns the icons of a set that their makers have not withdrawn, in order of name."""
    return {name: icon for name, icon in sorted(icon_set["icons"].items()) if not icon.get("hidden")}
