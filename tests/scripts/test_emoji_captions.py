# SPDX-License-Identifier: Apache-2.0
"""Reading and scoring of generated captions."""

import pytest

from emoji_recipe.captions import caption_accuracies, label_table, majority_accuracies, parse_caption


def row(style, label, subgroup, group):
    return {"style": style, "label": label, "subgroup": subgroup, "group": group}


APPLE = row("noto", "red apple", "fruit", "food")
PEAR = row("twemoji", "pear", "fruit", "food")
NORWAY = row("fluent", "flag: Norway", "country-flag", "flags")
TABLE = label_table([APPLE, PEAR, NORWAY])


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("noto: red apple", ("noto", "red apple")),
        ("  fluent 3d: flag: Norway ", ("fluent 3d", "flag: Norway")),
        ("noto tags: fruit, red", None),
        ("openmoji: pear", None),
        ("noto", None),
        ("noto: ", None),
        ("", None),
    ],
)
def test_caption_is_a_known_style_and_what_follows_the_first_colon(text, caption):
    assert parse_caption(text) == caption


def test_label_counts_whatever_the_style_and_unknown_labels_are_wrong():
    texts = ["twemoji: red apple", "noto: pear", "noto: red appl", "nonsense"]
    scores = caption_accuracies(texts, [APPLE] * 4, TABLE)
    assert scores == {"label": 0.25, "subgroup": 0.5, "group": 0.5, "style": 0.5, "known_label": 0.5}


def test_unknown_label_never_matches_itself():
    wanted = [row("noto", "unheard of", "fruit", "food")]
    assert caption_accuracies(["noto: unheard of"], wanted, TABLE)["label"] == 0


def test_numbers_that_differ_are_refused():
    with pytest.raises(ValueError, match="wanted"):
        caption_accuracies(["noto: pear"], [APPLE, PEAR], TABLE)


def test_majority_is_the_most_frequent_of_train_at_each_level_apart():
    train = [NORWAY, NORWAY, APPLE, PEAR, row("noto", "lime", "fruit", "food")]
    # the flag is the most frequent label, fruit the most frequent subgroup
    assert majority_accuracies(train, [APPLE, NORWAY]) == {"label": 0.5, "subgroup": 0.5, "group": 0.5}
    assert majority_accuracies(train, [APPLE]) == {"label": 0.0, "subgroup": 1.0, "group": 1.0}
