# SPDX-License-Identifier: Apache-2.0
"""Names of things and words of style in the file names of icons, names of emoji and flags, and the makers' tags."""

import pytest

from image_sets.emoji import Emoji
from image_sets.icon_names import HeldOutWords, emoji_name, held_out_slugs, read_emoji_names, read_names, stems
from image_sets.icon_sets import clean_tags, is_taken, package_of, pool_tags


def names_of(slugs, prefix="some-set", **declared):
    icon_set = {"prefix": prefix, "icons": {slug: {} for slug in slugs}, **declared}
    return {slug: (found.name, found.style) for slug, found in read_names(icon_set, slugs).items()}


def test_declared_endings_are_cut_the_longest_first():
    suffixes = {"20-filled": "20 Filled", "filled": "Filled", "outline-sharp": "Outline Sharp"}
    names = names_of(["add-20-filled", "add-filled", "fire-hydrant-outline-sharp", "filled"], suffixes=suffixes)
    expected = [("add", "20 filled"), ("add", "filled"), ("fire hydrant", "outline sharp"), ("filled", "")]
    assert list(names.values()) == expected


def test_a_word_of_style_that_belongs_to_the_name_stays():
    names = names_of(["traffic-light", "bell", "bell-light", "paint-solid", "paint-line"])
    assert names["traffic-light"] == ("traffic light", "")
    assert names["bell-light"] == ("bell", "light")
    assert names["paint-solid"] == ("paint", "solid")
    declared = names_of(["traffic-light", "traffic-light-light"], suffixes={"": "Regular", "light": "Light"})
    assert set(declared.values()) == {("traffic light", ""), ("traffic light", "light")}


def test_declared_beginnings_are_cut():
    names = names_of(["baseline-home", "twotone-home"], prefixes={"baseline": "Baseline", "twotone": "Two-Tone"})
    assert list(names.values()) == [("home", "baseline"), ("home", "two tone")]


def test_numbers_of_variants_are_cut_and_numbers_that_are_shown_stay():
    slugs = ["ad", "ad-2", "add-01", "add-12", *(f"dice-{number}" for number in range(1, 7)), "step-0", "step-1"]
    names = {slug: name for slug, (name, _) in names_of(slugs).items()}
    assert names["ad-2"] == names["ad"] == "ad"
    assert names["add-01"] == names["add-12"] == "add"
    assert names["dice-2"] == "dice 2"
    assert names["step-1"] == "step 1"


def make_emoji():
    items = [
        ("1F44B", "waving hand", False),
        ("1F44B-1F3FF", "waving hand: dark skin tone", True),
        ("1F3F0", "castle", False),
        ("1F1F3-1F1F4", "flag: Norway", False),
    ]
    return {code: Emoji(code, label, (), "", "", tone) for code, label, tone in items}


def test_emoji_are_named_by_code_point_or_by_name_with_tones_as_style():
    noto = {"prefix": "noto", "icons": {}, "chars": {"1f44b-1f3ff": "hand-dark"}}
    names = read_emoji_names(noto, ["hand-dark", "castle", "no-emoji-light-skin-tone"], make_emoji())
    assert (names["hand-dark"].name, names["hand-dark"].style) == ("waving hand", "dark skin tone")
    assert names["castle"].name == "castle"
    other = names["no-emoji-light-skin-tone"]
    assert (other.name, other.style) == ("no emoji", "light skin tone")
    assert emoji_name("flag: Côte d’Ivoire").name == "flag cote divoire"


def test_flags_are_named_by_the_code_of_the_place():
    names = read_emoji_names({"prefix": "flag"}, ["no-4x3", "no-1x1", "xx-1x1", "gb-eng-4x3"], make_emoji())
    assert {(name.name, name.style) for name in names.values()} == {("flag norway", "4x3"), ("flag norway", "1x1")}
    assert set(names) == {"no-4x3", "no-1x1"}


def test_what_the_emoji_set_holds_out_is_found_in_every_tone_and_in_its_own_family_only():
    icon_set = {"prefix": "twemoji", "icons": {}, "chars": {"1f44b": "wave", "1f44b-1f3ff": "wave-dark"}}
    slugs = ["wave", "wave-dark", "castle"]
    found = held_out_slugs(icon_set, slugs, make_emoji(), frozenset([("waving hand", "twemoji")]))
    assert found == {"wave", "wave-dark"}
    assert not held_out_slugs(icon_set, slugs, make_emoji(), frozenset([("waving hand", "noto")]))
    assert not held_out_slugs({"prefix": "lucide"}, ["castle"], make_emoji(), frozenset([("castle", "noto")]))


def test_tags_are_words_without_the_name_and_pooled_by_how_many_packages_give_them():
    assert clean_tags("house", ["*new*", "House", "real-estate", "Home", "home", "outline"]) == ["real estate", "home"]
    pooled = pool_tags({"a": {"house": ["home", "roof"]}, "b": {"house": ["place", "roof"]}})
    assert pooled == {"house": ["roof", "home", "place"]}
    assert package_of("fa7-solid") == package_of("fa") == "@fortawesome/fontawesome-free"
    assert package_of("fad") is None


@pytest.mark.parametrize(
    ("text", "found"),
    [("anvils", True), ("big anvil", True), ("cloud sync off", True), ("cloud", False), ("off", False), ("", False)],
)
def test_held_out_words_are_found_alone_and_pairs_only_together(text, found):
    assert HeldOutWords(["anvil", "cloud off"]).found_in(text) == found


def test_stems_join_plurals_and_leave_short_words():
    assert stems("Clouds bus gas") == {"cloud", "bus", "gas"}


def test_only_permissive_sets_that_are_no_brands_are_taken():
    info = {"license": {"spdx": "MIT"}, "category": "UI 24px"}
    assert is_taken("tabler", info)
    assert not is_taken("tabler", info | {"license": {"spdx": "CC-BY-SA-4.0"}})
    assert not is_taken("tabler", info | {"hidden": True})
    assert not is_taken("tabler", info | {"category": "Logos"})
    assert not is_taken("reicon", info)
    assert not is_taken("skill-icons", info)
