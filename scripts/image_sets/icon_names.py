# SPDX-License-Identifier: Apache-2.0
"""What an icon's file name says: the name of the thing, and words of style; names of emoji and flags by emojibase."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from image_sets.emoji import SKIN_TONE, Emoji, base_label, iconify_slug, label_slug, normalize_code_points


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

# which family of the emoji set each of Iconify's sets of emoji belongs to
EMOJI_FAMILIES = {
    "noto": "noto",
    "noto-v1": "noto v1",
    "twemoji": "twemoji",
    "fluent-emoji-flat": "fluent",
    "fluent-emoji-high-contrast": "fluent",
    "emojione": "emojione",
    "emojione-monotone": "emojione",
    "fxemoji": "fxemoji",
}
_FLAG_SETS = frozenset(("cif", "circle-flags", "flag", "flagpack"))
_TONE_ENDING = re.compile(r"((?:-(?:medium-light|medium-dark|light|medium|dark)-skin-tone)+)$")
_REGIONAL_A = 0x1F1E6


class IconName(NamedTuple):
    """The name of the thing that an icon shows, such as `fire extinguisher`, and its style words, often none."""

    name: str
    style: str


def words(text: str) -> list[str]:
    """The words of a text, lower-case."""
    return re.findall(r"\w+", text.lower())


def spaced(text: str) -> str:
    """A text in lower case, its words apart by single spaces and nothing else."""
    return " ".join(words(text))


def stems(text: str) -> frozenset[str]:
    """The words of a text, one form for singular and plural: `{"cloud", "arrow"}` for `"cloud arrows"`."""
    return frozenset(word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words(text))


class HeldOutWords:
    """Held-out words such as `"anvil"` and pairs such as `"cloud off"`, which must not stand together in one text."""

    def __init__(self, phrases: Iterable[str]):
        self._by_word = defaultdict(list)
        for phrase in map(stems, phrases):
            for word in phrase:
                self._by_word[word].append(phrase)

    def found_in(self, text: str) -> bool:
        """Whether all words of any of the held-out phrases stand in a text."""
        found = stems(text)
        return any(phrase <= found for word in found for phrase in self._by_word.get(word, ()))


def read_names(icon_set: dict, slugs: Iterable[str]) -> dict[str, IconName]:
    """Splits the file names of icons and of aliases of a set in Iconify's format."""
    slugs = list(slugs)
    endings, plain = _endings(icon_set)
    beginnings = icon_set.get("prefixes") or _SET_BEGINNINGS.get(icon_set["prefix"], {})
    known = set(slugs) | set(icon_set["icons"])
    parts = {slug: _cut_style(slug, endings, beginnings, plain, known) for slug in slugs}
    bases = _cut_variants({base for base, _ in parts.values()})
    return {
        slug: IconName(spaced(bases[base].replace("_", " ")), spaced(style)) for slug, (base, style) in parts.items()
    }


def _endings(icon_set):
    """The set's endings, the longest first, with their style, and whether a drawing may have none."""
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
    matches = {base: re.fullmatch(r"(.*\D)-(\d{1,2})", base) for base in bases}
    numbers = defaultdict(set)
    for match in filter(None, matches.values()):
        numbers[match[1]].add(match[2])
    return {base: match[1] if match and _are_variants(numbers[match[1]]) else base for base, match in matches.items()}


def _are_variants(numbers):
    if any(number.startswith("0") and number != "0" for number in numbers):
        return True
    return max(map(int, numbers)) <= _MOST_VARIANTS and "0" not in numbers


def match_emoji(icon_set: dict, slugs: list[str], emoji: dict[str, Emoji]) -> dict[str, Emoji]:
    """The emoji that each file name of a set of emoji stands for, by code point or by name, where known."""
    by_code = {slug: emoji.get(normalize_code_points(code)) for code, slug in icon_set.get("chars", {}).items()}
    by_name = {}
    for item in emoji.values():
        by_name.setdefault(iconify_slug(item.label, icon_set["prefix"]), item)
    matches = {slug: by_code.get(slug) or by_name.get(slug) for slug in slugs}
    return {slug: item for slug, item in matches.items() if item is not None}


def emoji_name(label: str) -> IconName:
    """The name of an emoji, with its tones of skin as style: `waving hand` and `dark skin tone`."""
    return IconName(spaced(label_slug(base_label(label))), spaced(" ".join(dict.fromkeys(SKIN_TONE.findall(label)))))


def read_emoji_names(icon_set: dict, slugs: list[str], emoji: dict[str, Emoji]) -> dict[str, IconName]:
    """As `read_names`, for sets of emoji and of flags of places. Other sets give nothing."""
    if icon_set["prefix"] in _FLAG_SETS:
        return _flag_names(slugs, emoji)
    if icon_set["prefix"] not in EMOJI_FAMILIES:
        return {}
    names = {slug: _name_by_slug(slug) for slug in slugs}
    return names | {slug: emoji_name(item.label) for slug, item in match_emoji(icon_set, slugs, emoji).items()}


def held_out_slugs(icon_set: dict, slugs: list[str], emoji: dict[str, Emoji], cells: frozenset) -> set[str]:
    """The file names of a set of emoji whose cell the emoji set holds out, whatever their tones of skin."""
    family = EMOJI_FAMILIES.get(icon_set["prefix"])
    if family is None:
        return set()
    held_out = {emoji_name(label).name for label, held_family in cells if held_family == family}
    matched = match_emoji(icon_set, slugs, emoji)
    by_label = {slug for slug, item in matched.items() if (base_label(item.label), family) in cells}
    names = read_emoji_names(icon_set, slugs, emoji)
    return by_label | {slug for slug, name in names.items() if name.name in held_out}


def _name_by_slug(slug):
    tones = _TONE_ENDING.search(slug)
    if tones is None:
        return IconName(spaced(slug), "")
    parts = dict.fromkeys(re.findall(r"(?:medium-)?(?:light|dark|medium)(?=-skin)", tones[1]))
    return IconName(spaced(slug.removesuffix(tones[1])), " ".join(f"{spaced(part)} skin tone" for part in parts))


def _flag_names(slugs, emoji):
    names = {}
    for slug in slugs:
        code, _, style = slug.partition("-")
        points = "-".join(f"{_REGIONAL_A + ord(letter) - ord('a'):X}" for letter in code if "a" <= letter <= "z")
        item = emoji.get(points)
        if len(code) == 2 and style in ("", "1x1", "4x3") and item is not None:
            names[slug] = IconName(spaced(label_slug(item.label)), style)
    return names
