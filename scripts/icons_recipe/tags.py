# SPDX-License-Identifier: Apache-2.0
"""The makers' own tags of their icons, from their npm packages."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from icons_recipe.names import words
from icons_recipe.sets import PACKAGES
from image_sets.npm import archive_path, read_files


MOST_TAGS = 12
# words of styles and notes to users say nothing about what is shown
_NO_TAGS = frozenset(("outline", "sharp", "filled", "fill", "new", "updated", "deprecated", "icon", "icons"))


def read_tags(cache: Path) -> dict[str, dict[str, list[str]]]:
    """Returns the tags of each package by name of the thing: `{"lucide-static": {"fire extinguisher": [...]}}`."""
    tags = {}
    for package, (pattern, read) in _READERS.items():
        (document,) = read_files(archive_path(cache, package, PACKAGES[package]), pattern).values()
        own = defaultdict(dict)
        for slug, raw in read(document.decode("utf-8")):
            name = " ".join(words(slug))
            own[name].update(dict.fromkeys(clean_tags(name, raw)))
        tags[package] = {name: list(found) for name, found in own.items() if found}
    return tags


def clean_tags(name: str, raw: list[str]) -> list[str]:
    """Returns tags in lower case and as words, each once, without the name itself and words of style."""
    found = dict.fromkeys(" ".join(words(tag.replace("_", " "))) for tag in raw)
    return [tag for tag in found if tag and tag != name and tag not in _NO_TAGS]


def pool_tags(tags: dict[str, dict[str, list[str]]]) -> dict[str, list[str]]:
    """Returns the tags of each name over all packages, those that most packages give first, at most `MOST_TAGS`."""
    counts = defaultdict(Counter)
    for package in sorted(tags):
        for name, found in tags[package].items():
            counts[name].update(found)
    return {name: [tag for tag, _ in found.most_common(MOST_TAGS)] for name, found in counts.items()}


def package_of(prefix: str) -> str | None:
    """Returns the package that has the tags of a set's own icons, or none."""
    if re.fullmatch(r"fa\d?(-.+)?", prefix):
        return "@fortawesome/fontawesome-free"
    return _OF_SET.get(prefix)


_OF_SET = {
    "lucide": "lucide-static",
    "tabler": "@tabler/icons",
    "carbon": "@carbon/icons",
    "ph": "@phosphor-icons/core",
    "ion": "ionicons",
    "mdi": "@mdi/svg",
}


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
