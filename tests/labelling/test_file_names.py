# SPDX-License-Identifier: Apache-2.0
"""Names of files in a search: their words, the tags that a memory has of them, and what they count for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_moma.labelling.file_names import file_name_shares, with_file_names
from modeling_moma.labelling.memory import ImageMemory


NAMES = ["cog", "cog off", "House", "arrow-left", "plain"]
TAGS = [["settings", "Gear"], ["disabled"], ["home", "real-estate", "+"], ["back"], []]


@pytest.fixture(scope="module")
def memory():
    states = torch.randn(len(NAMES), 8, generator=torch.Generator().manual_seed(0))
    return ImageMemory.build(states, NAMES, TAGS, states[0], "processor", dimensions=4)


@pytest.mark.parametrize(
    ("file", "query", "share"),
    [
        ("cog.svg", "cog", 1),
        ("cog-outline.svg", "Cog", 1 / 2),
        ("shoppingCart_24.png", "shopping cart", 2 / 3),
        # half of the letters of a longer word
        ("cogwheel.svg", "cog", 3 / 8 / 2),
        ("big-flywheel.svg", "wheel", 5 / 8 / 2 / 2),
        ("anticogwheel.svg", "cog", 0),
        ("cogs.svg", "cog", 1),
        ("batteries.svg", "battery", 1),
        ("bus.svg", "bu", 0),
        # by the memory
        ("cog.svg", "settings", 1),
        ("cog-off.svg", "disabled", 1),
        ("cog-off.svg", "setting", 1 / 2),
        ("house.svg", "real estate", 1),
        # no words at all
        ("---.svg", "cog", 0),
        ("house.svg", "+", 0),
        ("caf\udce9.svg", "cog", 0),
        # as macOS writes it
        ("cafe\u0301-au-lait.svg", "caf\u00e9", 1 / 3),
        ("\u6b6f\u8eca.svg", "\u6b6f\u8eca", 1),
    ],
)
def test_shares_of_words_that_speak_of_a_query(memory, file, query, share):
    assert file_name_shares([file], [query], memory).tolist() == [[share]]


def test_words_that_are_written_as_one_are_those_that_names_have():
    names = [f"{word} {number}" for word in ("arrow", "left", "up") for number in range(3)]
    states = torch.randn(len(names), 8, generator=torch.Generator().manual_seed(0))
    memory = ImageMemory.build(states, names, [["way"]] * 9, states[0], "processor", dimensions=4)
    files, queries = ["arrowleft.svg", "arrow-left.svg", "uparrow2.svg"], ["left", "arrowleft", "arrow left"]
    assert file_name_shares(files, queries, memory).tolist() == [[1 / 2, 1, 1], [1 / 2, 1, 1], [0, 0, 0]]


def test_without_a_memory_words_alone_count():
    assert file_name_shares(["cog.svg", "key.svg"], ["cog", "settings"]).tolist() == [[1, 0], [0, 0]]


WORDS = ["cog", "off", "house", "arrow", "left", "x", "24"]
OF_FILES = st.lists(st.sampled_from(WORDS), max_size=6)
LOOKED_FOR = st.sampled_from(["gear", "disabled", "home"]) | st.lists(st.sampled_from(WORDS)).map(" ".join)


@given(files=st.lists(OF_FILES, min_size=1, max_size=4), query=LOOKED_FOR)
def test_equal_a_plain_loop_over_all_runs_of_words(memory, files, query):
    found = file_name_shares(["-".join(words) + ".svg" for words in files], [query], memory)
    tags = {
        name.lower().replace("-", " "): [tag.lower() for tag in texts] for name, texts in zip(NAMES, TAGS, strict=True)
    }
    for words, share in zip(files, found.flatten().tolist(), strict=True):
        best = 0
        for start in range(len(words)):
            for stop in range(start + 1, len(words) + 1):
                run = " ".join(words[start:stop])
                if query == run or query in tags.get(run, []):
                    best = max(best, (stop - start) / len(words))
        assert share == pytest.approx(best)


@pytest.mark.parametrize("weight", [0.25, 1])
def test_scores_are_logarithms_of_the_mixture(weight):
    scores = torch.tensor([[-1.0, -3.0], [-math.inf, -2.0]], dtype=torch.float64)
    shares = torch.tensor([[0.0, 0.5], [1.0, 0.0]], dtype=torch.float64)
    mixed = with_file_names(scores, shares, weight)
    assert torch.allclose(mixed.exp(), (1 - weight) * scores.exp() + weight * shares)
