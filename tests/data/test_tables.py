# SPDX-License-Identifier: Apache-2.0
"""Tables in CSV whose rows have other fields than their headers name."""

import pytest
from datasets import config

from modeling_moma.data.sources import read_sources
from modeling_moma.errors_moma import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts(data, **load):
    (source,) = read_sources({"mine": {"data": str(data), "text": "text", "load": load}})
    return list(source.open("train")["text"])


@pytest.mark.parametrize("name, separator", [("d.csv", ","), ("d.tsv", "\t")])
def test_a_table_whose_first_row_is_longer_than_its_header_is_refused(tmp_path, name, separator):
    lines = "id,text\n\n1,Hello, world\n2,plain\n".replace(",", separator)
    (tmp_path / name).write_text(lines)
    with pytest.raises(InputError, match=r"first row of '.*d\..sv' has 3 fields, and its header names 2, .*index_col"):
        texts(tmp_path / name)
    with pytest.raises(InputError, match="has 3 fields"):
        texts(tmp_path / f"*.{name[2:]}")


def test_a_table_that_says_what_its_rows_begin_or_end_with_is_read(tmp_path):
    (tmp_path / "d.csv").write_text("text,size\nfirst,red,1\nsecond,blue,2\n")
    assert texts(tmp_path / "d.csv", index_col=0) == ["red", "blue"]
    (tmp_path / "d.csv").write_text("text,size\nred,1,\nblue,2,\n")
    assert texts(tmp_path / "d.csv", index_col=False) == ["red", "blue"]


@pytest.mark.parametrize("form", ["folder", "reader", "stream"])
def test_texts_of_tables_in_a_folder_are_the_characters_that_stand_there(tmp_path, form):
    words = ["007", "NA", "1.50"]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.csv").write_text("\n".join(["text", *words]) + "\n")
    data, load = str(tmp_path / "rows"), {"streaming": True} if form == "stream" else {}
    if form == "reader":
        data, load = "csv", {"data_files": f"{tmp_path}/rows/train.csv"}
    assert texts(data, **load) == words
    (tmp_path / "rows" / "train.csv").write_text("id,text\n1,Hello, world\n")
    with pytest.raises(InputError, match="has 3 fields"):
        texts(data, **load)


def test_commas_in_quotes_and_other_separators_are_no_further_fields(tmp_path):
    (tmp_path / "d.csv").write_text('text,size\n"red, round",1\n"two\nlines",2\n')
    assert texts(tmp_path / "d.csv") == ["red, round", "two\nlines"]
    (tmp_path / "d.csv").write_text("text;size\nred, round;1\n")
    assert texts(tmp_path / "d.csv", sep=";") == ["red, round"]
