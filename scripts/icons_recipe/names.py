# SPDX-License-Identifier: Apache-2.0
"""What an icon's file name says: the name of the thing, and words of style."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


# what sets that declare no endings of their own call their styles
_ENDINGS = (
    "outline-rounded outline-sharp outline-thin outline outlined filled fill solid line linear duotone twotone "
    "two-tone bold light thin regular sharp rounded round duo broken flat remix print pop stroke o alt"
).split()
# these are seldom part of a name, so they need no drawing of the same name beside them
_CLEAR_ENDINGS = frozenset(("outline", "outlined", "filled", "duotone", "twotone", "two-tone"))
# more than their sets declare
_SET_ENDINGS = {
    "clarity": ("line", "solid", "outline-badged", "solid-badged", "outline-alerted", "solid-alerted"),
    "garden": ("fill-12", "fill-16", "stroke-12", "stroke-16", "12", "16"),
    "osmic": ("10", "14"),
    "weui": ("filled", "outlined"),
}
_STYLES = {"o": "outline", "twotone": "two tone"}
_SET_BEGINNINGS = {"medical-icon": {"i": "inverted"}}
_MOST_VARIANTS = 3


@dataclass(frozen=True)
class IconName:
    """The name of the thing that an icon shows, such as `fire extinguisher`, and its style words, often none."""

    name: str
    style: str


def words(text: str) -> list[str]:
    """Returns the words of a text, lower-case."""
    return re.findall(r"\w+", text.lower())


def read_names(icon_set: dict, slugs: Iterable[str]) -> dict[str, IconName]:
    """
    Splits the file names of a set into names of things and words of style.

    Args:
        icon_set: the set in Iconify's format; its `suffixes` and `prefixes` name its styles where it has any.
        slugs: file names of icons and of aliases, such as `"fire-extinguisher-outline"`.

    Returns:
        The name and style of each file name.
    """
    slugs = list(slugs)
    endings, plain = _endings(icon_set)
    beginnings = icon_set.get("prefixes") or _SET_BEGINNINGS.get(icon_set["prefix"], {})
    known = set(slugs) | set(icon_set["icons"])
    parts = {slug: _cut_style(slug, endings, beginnings, plain, known) for slug in slugs}
    bases = _cut_variants({base for base, _ in parts.values()})
    return {
        slug: IconName(" ".join(words(bases[base].replace("_", " "))), " ".join(words(style)))
        for slug, (base, style) in parts.items()
    }


def _endings(icon_set):
    """Returns the set's endings, the longest first, with their style, and whether a drawing may have none."""
    declared = icon_set.get("suffixes", {})
    own = _SET_ENDINGS.get(icon_set["prefix"], () if declared else _ENDINGS)
    endings = {ending: style for ending, style in declared.items() if ending} | {ending: ending for ending in own}
    styles = {ending: _STYLES.get(style.lower(), style) for ending, style in endings.items()}
    return dict(sorted(styles.items(), key=lambda item: -len(item[0]))), not declared or "" in declared


def _cut_style(slug, endings, beginnings, plain, known):
    base, styles = slug, []
    for beginning, style in beginnings.items():
        if base.startswith(f"{beginning}-"):
            base, styles = base.removeprefix(f"{beginning}-"), [style]
            break
    for ending, style in endings.items():
        shorter = base.removesuffix(f"-{ending}")
        if shorter == base or not shorter:
            continue
        # a `traffic-light` is no light drawing of traffic
        twins = (f"{shorter}-{other}" for other in endings if other != ending)
        if not plain or ending in _CLEAR_ENDINGS or shorter in known or any(twin in known for twin in twins):
            return shorter, " ".join([*styles, style])
    return base, " ".join(styles)


def _cut_variants(bases):
    """Cuts numbers that count drawings of one thing, as in `ad-2` or `add-01`, from those that say what is shown."""
    numbers = defaultdict(set)
    for base in bases:
        if match := re.fullmatch(r"(.*\D)-(\d{1,2})", base):
            numbers[match[1]].add(match[2])
    cut = {}
    for base in bases:
        match = re.fullmatch(r"(.*\D)-(\d{1,2})", base)
        cut[base] = match[1] if match and _are_variants(numbers[match[1]]) else base
    return cut


def _are_variants(numbers):
    if any(number.startswith("0") and number != "0" for number in numbers):
        return True
    return max(map(int, numbers)) <= _MOST_VARIANTS and "0" not in numbers
