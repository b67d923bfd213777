# SPDX-License-Identifier: Apache-2.0
"""The spoken words and labels: which are held out, and what espeak-ng makes of them."""

import shutil
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Dataset

import build_spoken
from build_spoken import (
    HELD_OUT_LABELS,
    HELD_OUT_ORDER,
    ORDERS,
    SAMPLING_RATE,
    SPLITS,
    STYLE,
    VOICES,
    VOICES_A_DRAWING,
    SpokenDrawing,
    as_flac,
    choose_voices,
    read_emoji,
    read_words,
    speak,
    split_drawings,
    split_labels,
    split_of,
    split_words,
)
from modeling_moma.data.sources import undecoded_rows


WORDS = [f"word{letter}{other}" for letter in "abcdefghij" for other in "abcdefghijklmnopqrst"]
LABELS = [*WORDS[::4], *(f"{word} face" for word in WORDS)]


def drawings_of(labels):
    return [{"label": label, "image": {"bytes": b"", "path": None}} for label in labels]


def test_no_held_out_word_or_label_is_spoken_in_another_split():
    label_splits = split_labels(LABELS)
    words, drawings = split_words(WORDS, label_splits), split_drawings(drawings_of(LABELS), label_splits)
    spoken = {split: {row.word for row in words[split]} | {row.label for row in drawings[split]} for split in SPLITS}
    assert all(spoken.values())
    assert not spoken["train"] & (spoken["validation"] | spoken["test"]) and not spoken["validation"] & spoken["test"]
    assert spoken["train"] | spoken["validation"] | spoken["test"] == {*WORDS, *LABELS}
    # a word that is a label stands where the label does
    single = set(WORDS) & set(LABELS)
    assert {label_splits[word] for word in single} == set(SPLITS)
    for word in single:
        assert {split for split in SPLITS if any(row.word == word for row in words[split])} == {label_splits[word]}


def test_splits_are_the_same_every_time_and_of_the_shares_asked_for():
    splits = [split_of(f"label/{number}", HELD_OUT_LABELS) for number in range(4000)]
    assert splits == [split_of(f"label/{number}", HELD_OUT_LABELS) for number in range(4000)]
    for split, share in HELD_OUT_LABELS.items():
        assert abs(splits.count(split) / 4000 - share) < 0.02
    assert len({voice.name for voice in choose_voices("castle", 3)}) == 3
    assert choose_voices("castle", 3) == choose_voices("castle", 3)[:3]
    assert {voice.name for word in WORDS for voice in choose_voices(word, 1)} == {voice.name for voice in VOICES}


def test_held_out_drawings_come_after_one_sound_each():
    drawings = split_drawings(drawings_of(LABELS), split_labels(LABELS))
    for split in ("validation", "test"):
        assert all(row.order == HELD_OUT_ORDER for row in drawings[split])
        assert len(drawings[split]) == len({row.label for row in drawings[split]})
    train = drawings["train"]
    assert len(train) == VOICES_A_DRAWING * len({row.label for row in train})
    orders = [row.order for row in train]
    for order, share in ORDERS.items():
        assert abs(orders.count(order) / len(train) - share) < 0.08
    assert sum(ORDERS.values()) == pytest.approx(1)


def test_drawings_are_those_of_one_designer_and_hold_what_their_order_says(tmp_path):
    image = {"bytes": b"a", "path": None}
    rows = [{"label": "cat", "style": style, "image": image} for style in (STYLE, "another")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "emoji.parquet")
    assert read_emoji(tmp_path / "emoji.parquet") == [{"label": "cat", "image": image}]


def test_words_are_read_from_labels_and_lists(tmp_path):
    rows = {"label": ["red Apple", "a cat's face"], "keywords": [["fruit", "red"], []], "other": ["none", "of these"]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    assert read_words([tmp_path / "rows.parquet"]) == ["apple", "cat", "face", "fruit", "red"]


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed (apt-get install espeak-ng)")
def test_rows_are_spoken_and_read_again(tmp_path):
    sound = speak("castle", VOICES[0])
    assert 0.2 < len(sound) / SAMPLING_RATE < 1.5 and np.abs(sound).max() > 0.1
    assert np.array_equal(sound, speak("castle", VOICES[0])) and len(sound) != len(speak("castle", VOICES[2]))
    again, rate = soundfile.read(BytesIO(as_flac(sound)), dtype="float32")
    assert rate == SAMPLING_RATE and np.abs(again - sound).max() < 1e-4
    entries = split_words(["castle"], {"castle": "train"})["train"]
    path = tmp_path / "words" / "train.parquet"
    build_spoken.write_split(path, entries, build_spoken.word_row, build_spoken.WORD_FEATURES, 1)
    rows = list(undecoded_rows(Dataset.from_parquet(str(path))))
    assert [row["word"] for row in rows] == ["castle"] * 3
    assert rows[0]["audio"]["bytes"][:4] == b"fLaC"
    image = {"bytes": b"image", "path": None}
    for order in ORDERS:
        entry = SpokenDrawing("cat face", VOICES[0], image, order)
        build_spoken.write_split(path, [entry], build_spoken.drawing_row, build_spoken.DRAWING_FEATURES, 1)
        (row,) = undecoded_rows(Dataset.from_parquet(str(path)))
        parts = [{name: value for name, value in part.items() if value} for part in row["segments"]]
        assert [list(part) for part in parts] == [[name] for name in order]
        values = {name: value for part in parts for name, value in part.items()}
        assert values["image"]["bytes"] == b"image" and values.get("text", "cat face") == "cat face"


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="apt-get install espeak-ng"):
        speak("castle", VOICES[0])
