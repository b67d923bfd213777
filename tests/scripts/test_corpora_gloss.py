# SPDX-License-Identifier: Apache-2.0
"""Lines of WordNet's files become lines of text."""

import pytest

from corpora_recipe.gloss import FILES, count_table, parse_glosses, read_glosses, split_glosses


LICENCE = "  1 This software and database is being provided to you  \n"
APPLE = (
    "07739125 13 n 01 apple 0 002 @ 07705931 n 0000 ~ 07739344 n 0000 | fruit with red or yellow or green skin and "
    "sweet to tart crisp whitish flesh  \n"
)
ABSTRACTION = '00002137 03 n 02 abstraction 0 abstract_entity 0 001 @ 00001740 n 0000 | a concept; "it | is"  \n'
GALORE = "00013887 00 s 02 galore(ip) 0 ample 1 000 | existing in abundance  \n"
# ten words: WordNet counts them in hexadecimal
MANY = "00000001 00 a 0a " + " ".join(f"w{number} 0" for number in range(10)) + " 000 | many words\n"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (APPLE, "apple: fruit with red or yellow or green skin and sweet to tart crisp whitish flesh"),
        (ABSTRACTION, 'abstraction, abstract entity: a concept; "it | is"'),
        (GALORE, "galore, ample: existing in abundance"),
        (MANY, "w0, w1, w2, w3, w4, w5, w6, w7, w8, w9: many words"),
    ],
)
def test_line_is_words_and_gloss(line, text):
    (gloss,) = parse_glosses([LICENCE, line], "n")
    assert gloss.text == text and gloss.key == f"n{line[:8]}"


@pytest.mark.parametrize("line", ["07739125 13 n 01 apple 0 000\n", "apple | a fruit\n", "1 2 n zz apple 0 | x\n"])
def test_line_of_something_else_is_named(line):
    with pytest.raises(ValueError, match=r"data\.noun, line 2"):
        list(parse_glosses([APPLE, line], "n", "data.noun"))


def test_files_are_read_in_order_and_split_by_their_keys(tmp_path):
    for name in FILES:
        (tmp_path / f"data.{name}").write_text(LICENCE + APPLE.replace("apple", name) + GALORE)
    glosses = list(read_glosses(tmp_path))
    assert [gloss.key[0] for gloss in glosses] == ["n", "n", "v", "v", "a", "a", "r", "r"]
    rows = split_glosses(glosses, 0.5)
    assert rows == split_glosses(glosses, 0.5)
    assert sorted(row["text"] for part in rows.values() for row in part) == sorted(gloss.text for gloss in glosses)
    assert "| all | 8 |" in count_table(rows, "1-1")
