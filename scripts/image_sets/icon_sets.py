# SPDX-License-Identifier: Apache-2.0
"""Which of Iconify's sets are taken, their makers' families, and the makers' own tags of their icons."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from image_sets.icon_names import words
from image_sets.packages import ICONIFY, read_files


LICENSES = frozenset(
    ("MIT", "Apache-2.0", "CC-BY-4.0", "CC-BY-3.0", "CC0-1.0", "OFL-1.1", "ISC", "Unlicense", "BSD-3-Clause")
)
# marks of companies and projects outside Iconify's category of logos
_BRANDS = frozenset(
    (
        "academicons catppuccin devicon devicon-plain fa-brands fa6-brands file-icons gcp k8s material-icon-theme "
        "skill-icons unjs vscode-icons"
    ).split()
)
# draws what the set `solar` draws, under another licence
_COPIES = frozenset(("reicon",))

_FAMILIES = {
    "boxicons": ("boxicons", "bx", "bxs"),
    "fluent": ("fluent", "fluent-color", "fluent-mdl2"),
    "fluent-emoji": ("fluent-emoji-flat", "fluent-emoji-high-contrast"),
    "font-awesome": ("fa", "fa-regular", "fa-solid", "fa6-regular", "fa6-solid", "fa7-regular", "fa7-solid"),
    "glyphs": ("glyphs", "glyphs-poly"),
    "emojione": ("emojione", "emojione-monotone"),
    "heroicons": ("heroicons", "heroicons-outline", "heroicons-solid"),
    "icon-park": ("icon-park", "icon-park-outline", "icon-park-solid", "icon-park-twotone"),
    "icons8": ("icons8", "flat-color-icons", "la", "wpf"),
    "ion": ("ion", "famicons"),
    "lucide": ("lucide", "lucide-lab"),
    "material": ("material-symbols", "material-symbols-light", "ic", "mdi", "mdi-light"),
    "pepicons": ("pepicons-pencil", "pepicons-pop", "pepicons-print"),
    "streamline-freehand": ("streamline-freehand", "streamline-freehand-color"),
    "unicons": ("uil", "uim", "uis", "uit"),
}
_FAMILY_OF_SET = {prefix: family for family, prefixes in _FAMILIES.items() for prefix in prefixes}

MOST_TAGS = 12
# words of styles and notes to users say nothing about what is shown
_NO_TAGS = frozenset(("outline", "sharp", "filled", "fill", "new", "updated", "deprecated", "icon", "icons"))
_TAGS_OF_SET = {
    "lucide": "lucide-static",
    "tabler": "@tabler/icons",
    "carbon": "@carbon/icons",
    "ph": "@phosphor-icons/core",
    "ion": "ionicons",
    "mdi": "@mdi/svg",
}


def is_taken(prefix: str, info: dict) -> bool:
    """Whether a set of Iconify's list is permissively licensed, not deprecated, not of brands, and no copy."""
    return (
        info["license"].get("spdx") in LICENSES
        and not info.get("hidden")
        and not _is_of_brands(prefix, info)
        and prefix not in _COPIES
    )


def _is_of_brands(prefix, info):
    return info.get("category") == "Logos" or prefix in _BRANDS


def read_collections(cache: Path) -> tuple[dict[str, dict], frozenset[str]]:
    """Iconify's entry of every set that is taken, by prefix in order, and words that are names of brands' icons."""
    listed = json.loads(read_files(cache, ICONIFY, r"collections\.json")["collections.json"])
    brands = [prefix for prefix, info in listed.items() if _is_of_brands(prefix, info)]
    slugs = (slug for _, document in read_set_files(cache, brands) for slug in json.loads(document)["icons"])
    taken = {prefix: info for prefix, info in sorted(listed.items()) if is_taken(prefix, info)}
    return taken, frozenset(slug for slug in slugs if slug.isalpha())


def read_set_files(cache: Path, prefixes: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Prefix and JSON document of each named set, one after the other, as the archive holds them."""
    wanted = "|".join(re.escape(prefix) for prefix in sorted(prefixes))
    if wanted:
        for path, document in sorted(read_files(cache, ICONIFY, rf"json/({wanted})\.json").items()):
            yield Path(path).stem, document


def maker_family(prefix: str) -> str:
    """The family of a set by its maker: `"material"` for `"mdi"`; most sets are a family of their own."""
    return _FAMILY_OF_SET.get(prefix) or ("streamline" if prefix.startswith("streamline") else prefix)


def read_tags(cache: Path) -> dict[str, dict[str, list[str]]]:
    """The tags of each package by name of the thing: `{"lucide-static": {"fire extinguisher": [...]}}`."""
    tags = {}
    for package, (pattern, read) in _READERS.items():
        (document,) = read_files(cache, package, pattern).values()
        own = defaultdict(dict)
        for slug, raw in read(document.decode("utf-8")):
            name = " ".join(words(slug))
            own[name].update(dict.fromkeys(clean_tags(name, raw)))
        tags[package] = {name: list(found) for name, found in own.items() if found}
    return tags


def clean_tags(name: str, raw: list[str]) -> list[str]:
    """Tags in lower case and as words, each once, without the name itself and words of style."""
    found = dict.fromkeys(" ".join(words(tag.replace("_", " "))) for tag in raw)
    return [tag for tag in found if tag and tag != name and tag not in _NO_TAGS]


def pool_tags(tags: dict[str, dict[str, list[str]]]) -> dict[str, list[str]]:
    """The tags of each name over all packages, those that most packages give first, at most `MOST_TAGS`."""
    counts = defaultdict(Counter)
    for package in sorted(tags):
        for name, found in tags[package].items():
            counts[name].update(found)
    return {name: [tag for tag, _ in found.most_common(MOST_TAGS)] for name, found in counts.items()}


def package_of(prefix: str) -> str | None:
    """The package that has the tags of a set's own icons, or none."""
    if re.fullmatch(r"fa\d?(-.+)?", prefix):
        return "@fortawesome/fontawesome-free"
    return _TAGS_OF_SET.get(prefix)


def _read_lucide(text):
    yield from json.loads(text).items()


def _read_tabler(text):
    for icon in json.loads(text).values():
        yield icon["name"], [str(tag) for tag in icon["tags"]]


def _read_font_awesome(text):
    for name, icon in json.loads(text).items():
        yield name, [*icon.get("search", {}).get("terms", ()), *icon.get("aliases", {}).get("names", ())]


def _read_carbon(text):
    for icon in json.loads(text)["icons"]:
        yield icon["name"], icon.get("aliases", [])


def _read_phosphor(text):
    # a module of JavaScript: one object for each icon, with a list of strings as `tags`
    for name, found in re.findall(r'\bname: "([^"]+)",.*?\btags: \[(.*?)\]', text, flags=re.DOTALL):
        yield name, re.findall(r'"([^"]*)"', found)


def _read_ionicons(text):
    for icon in json.loads(text)["icons"]:
        yield re.sub(r"-(outline|sharp)$", "", icon["name"]), icon["tags"]


def _read_mdi(text):
    for icon in json.loads(text):
        yield icon["name"], [*icon["aliases"], *(part for tag in icon["tags"] for part in tag.split(" / "))]


_READERS: dict[str, tuple[str, Callable]] = {
    "lucide-static": (r"tags\.json", _read_lucide),
    "@tabler/icons": (r"icons\.json", _read_tabler),
    "@fortawesome/fontawesome-free": (r"metadata/icon-families\.json", _read_font_awesome),
    "@carbon/icons": (r"metadata\.json", _read_carbon),
    "@phosphor-icons/core": (r"dist/index\.mjs", _read_phosphor),
    "ionicons": (r"dist/ionicons\.json", _read_ionicons),
    "@mdi/svg": (r"meta\.json", _read_mdi),
}
