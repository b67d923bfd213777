# SPDX-License-Identifier: Apache-2.0
"""The card of the model of icons: every number from the report."""

import copy
import json

import pytest

from icon_evaluation.card import EVALUATION_FILE, RELEASED, fill_card, write_card
from modeling_moma.errors_moma import InputError
from modeling_moma.training.recipe import read_recipe


REPORT = json.loads((RELEASED.parent / EVALUATION_FILE).read_text())


def test_the_released_card_is_what_its_report_makes_of_it():
    card = RELEASED.read_text()
    assert fill_card(card, REPORT) == card
    recipes = RELEASED.parents[2] / "recipes"
    for name in ("moma-icons.yaml", "moma-icons-typical.yaml"):
        assert f"`recipes/{name}`" in card
        assert f"{read_recipe(recipes / name).trainer['max_steps']:,} steps of 16 rows" in card


def test_another_report_is_written_into_a_folder_without_a_card(tmp_path):
    report = copy.deepcopy(REPORT)
    report["memory"], report["tags"]["test_pairs"] = None, None
    report["names"]["test"]["model"]["top1"] = 0.1234
    report["names"]["test"]["model_of_views"]["top5"] = 0.3
    report["search"]["test_words"] = None
    write_card(tmp_path, report)
    card = (tmp_path / "README.md").read_text()
    for text in ("value: 0.1234", "| `test`, MoMa | 12.3 % |", "value: 0.3\n"):
        assert text in card, text
    assert "- Memory: " not in card and "| `test_words` |" not in card
    (tmp_path / "README.md").write_text(card.replace("<!-- tags: end -->", ""))
    with pytest.raises(InputError, match="the card needs the comments <!-- tags: start -->"):
        write_card(tmp_path, report)
