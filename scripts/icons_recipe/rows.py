# SPDX-License-Identifier: Apache-2.0
"""Puts images, names and tags of all sets together into rows."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emoji_recipe.sources import Emoji
from icons_recipe.emoji import EMOJI_FAMILIES, match_emoji, read_emoji_names
from icons_recipe.families import maker_family
from icons_recipe.names import IconName, read_names
from icons_recipe.rendering import read_rendered
from icons_recipe.sets import read_set_files
from icons_recipe.tags import MOST_TAGS, package_of


@dataclass(frozen=True, slots=True)
class Row:
    """
    One image with all that is said of it.

    `image` is a WebP file; `grey` and `stored_grey` are the 16x16 grey values of the drawing, in black, and of what
    the file holds of it.
    """

    set: str
    icon: str
    family: str
    name: str
    style: str
    aliases: tuple[str, ...]
    keywords: tuple[str, ...]
    categories: tuple[str, ...]
    colour: str | None
    license: str
    image: bytes
    grey: bytes
    stored_grey: bytes
    hash: str

    @property
    def cell(self) -> tuple[str, str]:
        """The (family, name) cell: images of one cell show the same thing by the same maker."""
        return self.family, self.name

    @property
    def label(self) -> str:
        """The name, with the colour before it where the image has one that is not black."""
        return self.name if self.colour in (None, "black") else f"{self.colour} {self.name}"

    @property
    def full_style(self) -> str:
        """Whose drawing it is, and in which style: `tabler, outline`."""
        maker = self.set.replace("-", " ")
        return f"{maker}, {self.style}" if self.style else maker


def read_rows(
    cache: Path, collections: dict[str, dict], tags: dict[str, dict[str, list[str]]], pooled: dict, emoji: dict
) -> Iterator[Row]:
    """
    Yields a row for each rendered icon, set by set, in order of names.

    Args:
        cache: folder of archives and rendered sets.
        collections: Iconify's entry of each set.
        tags: the tags of each package by name, as `read_tags` returns them.
        pooled: the tags of each name over all packages, as `pool_tags` returns them.
        emoji: the emoji of emojibase by code points.
    """
    for prefix, document in read_set_files(cache, collections):
        icon_set = json.loads(document)
        rendered = read_rendered(cache, prefix).to_pylist()
        slugs = [item["icon"] for item in rendered]
        aliases = _readable_aliases(icon_set)
        names = read_names(icon_set, [*slugs, *aliases])
        names |= read_emoji_names(icon_set, [*slugs, *aliases], emoji)
        synonyms = _synonyms(names, aliases)
        categories = _categories(icon_set)
        matched = match_emoji(icon_set, slugs, emoji) if prefix in EMOJI_FAMILIES else {}
        own = tags.get(package_of(prefix) or "", {})
        for item in rendered:
            slug = item["icon"]
            name = names[slug].name
            keywords = _emoji_tags(matched[slug]) if slug in matched else own.get(name) or pooled.get(name, ())
            yield Row(
                set=prefix,
                icon=slug,
                family=maker_family(prefix),
                name=name,
                style=names[slug].style,
                aliases=tuple(synonyms.get(slug, ())),
                keywords=tuple(keywords[:MOST_TAGS]),
                categories=tuple(categories.get(slug, ())),
                colour=item["colour"],
                license=collections[prefix]["license"]["spdx"],
                image=item["webp"],
                grey=item["grey"],
                stored_grey=item["stored_grey"],
                hash=item["hash"],
            )


def _emoji_tags(item: Emoji):
    return list(item.keywords)


def _readable_aliases(icon_set):
    """Returns the icon behind each alias that neither turns nor mirrors it."""
    entries, found = icon_set.get("aliases", {}), {}
    for alias in entries:
        target, steps = alias, 0
        while target in entries and set(entries[target]) == {"parent"} and steps < len(entries):
            target, steps = entries[target]["parent"], steps + 1
        if target in icon_set["icons"]:
            found[alias] = target
    return found


def _synonyms(names: dict[str, IconName], aliases: dict[str, str]):
    """Returns the other names of each icon, without its own."""
    synonyms = {}
    for alias, slug in sorted(aliases.items()):
        if slug in names and names[alias].name != names[slug].name:
            synonyms.setdefault(slug, {})[names[alias].name] = None
    return synonyms


def _categories(icon_set):
    categories = {}
    for category, slugs in sorted(icon_set.get("categories", {}).items()):
        for slug in slugs if category.strip() else ():
            categories.setdefault(slug, []).append(category.strip().lower())
    return categories
