# SPDX-License-Identifier: Apache-2.0
"""Own data as people have them: folders sorted into splits, tables, missing images, misspelt fields."""

import csv
import errno
import json
import shutil
from collections import Counter
from datetime import date
from itertools import permutations

import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, config, load_from_disk
from pyarrow import parquet

from helpers.tiny import noise_images, tiny_documents, tiny_processor
from modeling_moma import MomaMetricsCallback
from modeling_moma.cli import tokenize
from modeling_moma.data.documents import TokenFolder
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.data.sources import read_sources, source_texts
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.held_out import read_held_out
from modeling_moma.training.image_store import candidates
from modeling_moma.training.pretraining import training_stream
from modeling_moma.training.recipe import DataFields, SampleFields
from modeling_moma.training.samples import SampleCallback
from modeling_moma.utils import atomic_files


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(tmp_path, capsys):
    """Tokenizes one source by the command; gives the manifest's entry, the split's captions and what was printed."""
    tiny_processor().save_pretrained(tmp_path / "processor")

    def run(*flags, sequence_length=512, **fields):
        recipe = tmp_path / "recipe.yaml"
        data = {"sequence_length": sequence_length}
        recipe.write_text(json.dumps({"sources": {"mine": {"held_out": 0, **fields}}, "data": data}))
        command = [str(recipe), "--processor", str(tmp_path / "processor"), "--output", str(tmp_path / "tokens")]
        tokenize.main([*command, "--processes", "1", *flags])
        tokens = TokenFolder(tmp_path / "tokens", tiny_processor())
        (source,) = tokens.sources()
        documents = {name: tokens.documents(source, name) for name in tokens.split_names("mine")}
        return tokens.manifest["sources"]["mine"], documents, capsys.readouterr().out

    return run


def sorted_photos(folder, splits, suffix="csv"):
    rows = []
    for split in splits:
        (folder / split / "deeper").mkdir(parents=True)
        for index, image in enumerate(noise_images(3)):
            name = f"{split}/deeper/{index}.png" if index else f"{split}/0.png"
            image.save(folder / name)
            rows.append({"file_name": name, "text": f"{split} {index}"})
    if suffix == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        return
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    "splits, suffix", [(["train"], "csv"), (["train", "val"], "jsonl"), (["training", "test", "validation"], "csv")]
)
def test_captions_above_the_folders_of_splits_are_read(run, tmp_path, splits, suffix):
    sorted_photos(tmp_path / "photos", splits, suffix)
    _, documents, _ = run(data=str(tmp_path / "photos"), image="image", text="text")
    names = {"training": "train", "val": "validation"}
    assert {name: [entry.caption(row) for row in range(len(entry))] for name, entry in documents.items()} == {
        names.get(split, split): [f"{split} {index}" for index in range(3)] for split in splits
    }


def test_a_row_without_an_image_above_such_folders_is_left_out(run, tmp_path):
    sorted_photos(tmp_path / "photos", ["train", "test"], "jsonl")
    with open(tmp_path / "photos" / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": None, "text": "nothing"}) + "\n")
    entry, documents, _ = run(data=str(tmp_path / "photos"), image="image", text="text")
    assert entry["read"]["train"]["left_out"] == {"image missing": 1} and len(documents["train"]) == 3


def test_part_or_stream_of_such_a_split_is_refused(tmp_path):
    sorted_photos(tmp_path / "photos", ["train", "test"])
    fields = {"data": str(tmp_path / "photos"), "image": "image", "text": "text"}
    source = read_sources({"mine": fields})[0]
    with pytest.raises(ValueError, match="one file of captions above.*put the captions of each split into its folder"):
        source.open("train[:1]")


@pytest.mark.parametrize(
    "splits, expected",
    [
        ({"train": "train[:2]+test"}, {"train": "train[:2]+test", "more": "more"}),
        ({"train": "train[:2]+more[1:]"}, {"train": "train[:2]+more[1:]", "test": "test"}),
        ({"train": "train", "test": "more[:1]"}, {"train": "train", "test": "more[:1]", "more": "more"}),
        ({"validation": "test+more"}, {"train": "train", "validation": "test+more"}),
        ({"train": "train+tset"}, "has no split 'train\\+tset'"),
        ({"train": "train[:2"}, "the split 'train\\[:2' cannot be read"),
    ],
)
def test_splits_may_be_put_together_and_are_then_no_split_of_their_own(tmp_path, splits, expected):
    for name in ("train", "test", "more"):
        Dataset.from_dict({"text": [f"{name} {row}" for row in range(3)]}).to_parquet(tmp_path / f"{name}.parquet")
    files = "".join(f"  - {{split: {name}, path: {name}.parquet}}\n" for name in ("train", "test", "more"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    (source,) = read_sources({"mine": {"data": str(tmp_path), "text": "text", "splits": splits}})
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            source.split_names()
        return
    assert source.split_names() == expected
    assert all(len(source.open(split)) for split in expected.values())


CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/train-*.parquet}\n---\n"


def write_carded(folder, name, *texts):
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(CARD)
    Dataset.from_dict({"text": list(texts)}).to_parquet(folder / "data" / f"train-{name}.parquet")


def test_files_that_come_to_a_folder_with_a_card_are_read_and_those_of_another_are_not(tmp_path):
    def texts(folder):
        (source,) = read_sources({"mine": {"data": str(folder), "text": "text"}})
        return source.open("train")["text"][:]

    write_carded(tmp_path / "one" / "mine", "sample", "a")
    write_carded(tmp_path / "two" / "mine", "sample", "b")
    assert texts(tmp_path / "one" / "mine") == ["a"]
    assert texts(tmp_path / "two" / "mine") == ["b"]
    write_carded(tmp_path / "one" / "mine", "00000", "c", "d")
    assert texts(tmp_path / "one" / "mine") == ["c", "d", "a"]
    write_carded(tmp_path / "one" / "mine", "sample", "e")
    assert texts(tmp_path / "one" / "mine") == ["c", "d", "e"]


@pytest.mark.parametrize("name", ["d [1].jsonl", "d?.jsonl"])
def test_a_file_that_is_there_is_no_pattern(run, tmp_path, name):
    (tmp_path / name).write_text('{"text": "one"}\n')
    (tmp_path / "d1.jsonl").write_text('{"text": "another"}\n')
    entry, documents, _ = run(data=str(tmp_path / name), text="text")
    assert entry["read"]["train"]["rows"] == len(documents["train"]) == 1


@pytest.mark.parametrize("name", [".", "deeper/.."])
def test_the_working_directory_is_a_folder_of_data(tmp_path, monkeypatch, name):
    write_carded(tmp_path, "sample", "a")
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path)
    (source,) = read_sources({"mine": {"data": name, "text": "text"}})
    assert source.split_names() == {"train": "train"} and source.open("train")["text"][:] == ["a"]
    write_carded(tmp_path, "more", "b")
    assert source.open("train")["text"][:] == ["b", "a"]


@pytest.mark.parametrize("suffix, separator", [("csv", ","), ("tsv", "\t")])
def test_captions_of_a_table_are_the_characters_that_stand_there(run, tmp_path, suffix, separator):
    words = ["007", "NA", "null", "1.50", "True", ""]
    (tmp_path / f"d.{suffix}").write_text("\n".join(separator.join(row) for row in [("a", "b"), *zip(words, words)]))
    entry, documents, _ = run(data=str(tmp_path / f"d.{suffix}"), text="{a} {b}")
    assert entry["read"]["train"]["left_out"] == {"text empty": 1}
    decode = tiny_processor().tokenizer.decode
    found = [decode(documents["train"].ids(row, None)) for row in range(len(words) - 1)]
    assert found == [f"<bos>{word} {word}<eos>" for word in words[:-1]]


@pytest.mark.parametrize("sequence_length, left_out", [(18, 1), (19, 0)])
def test_image_that_fits_in_no_sequence_is_left_out_of_its_document(run, tmp_path, sequence_length, left_out):
    processor = tiny_processor()
    assert processor.image_seq_length == 16
    noise_images(1)[0].save(tmp_path / "0.png")
    rows = [{"parts": [{"text": "red"}, {"image": "0.png"}]}, {"parts": [{"text": " "}]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    entry, documents, _ = run(data=str(tmp_path / "d.jsonl"), segments="parts", sequence_length=sequence_length)
    reasons = Counter(row["reason"] for row in entry["read"]["train"]["named"])
    assert reasons == Counter({"image too long": left_out, "document empty": 1}) + Counter()
    assert len(documents["train"]) == 1
    tokens = TokenFolder(tmp_path / "tokens", processor)
    stream = training_stream(DataFields(sequence_length), tokens, tokens.sources(), 4, seed=0)
    assert len([stream[index] for index in range(4)]) == 4


def test_second_start_says_that_the_folder_cannot_be_written_into_any_more(run, tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n')
    run(data=str(tmp_path / "d.jsonl"), text="text")
    monkeypatch.setattr(atomic_files, "TemporaryFile", refuse)
    with pytest.raises(InputError, match="--output: nothing can be written into '.*tokens' .*Read-only file system"):
        run(data=str(tmp_path / "d.jsonl"), text="text")


@pytest.mark.parametrize(
    "kind, values, expected, left_out",
    [
        ("text", ["a", {"k": "v"}, 2, ["x", None, "y"], ["", None]], ["a", "2", "x, y"], (1, 1)),
        ("caption", ["a", {"k": "v"}, 2, ["x", None, "y"], ["", None]], ["a", "2", "x, y"], (1, 1)),
        ("text", [1.5, float("nan"), None], ["1.5"], (2, 0)),
        ("caption", [1942.0, None, 1e300], ["1942", "1e+300"], (1, 0)),
        ("caption", [[["a"], ["b", "c"]], [[]]], ["a, b, c"], (1, 0)),
        ("text", [date(2020, 1, 2), None], ["2020-01-02"], (1, 0)),
        ("text", [b"a", b"b"], [], (0, 2)),
    ],
)
def test_texts_are_read_from_all_but_bytes_and_mappings(run, tmp_path, kind, values, expected, left_out):
    if isinstance(values[0], str):
        rows = [{"text": value, "image": "0.png"} for value in values]
        name = "d.jsonl"
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        name = "d.parquet"
        parquet.write_table(pa.table({"text": values, "image": ["0.png"] * len(values)}), tmp_path / name)
    noise_images(1)[0].save(tmp_path / "0.png")
    fields = {"data": str(tmp_path / name), "text": "text", **({"image": "image"} if kind == "caption" else {})}
    (source,) = read_sources({"mine": fields})
    assert list(source_texts([source], 10)) == expected
    if not expected:
        with pytest.raises(ValueError, match="2 rows 2 text not readable; the first: \"column 'text' holds a bytes"):
            run(**fields)
        return
    entry, documents, _ = run(**fields)
    written = documents["train"]
    decode = tiny_processor().tokenizer.decode
    texts = [
        written.caption(row) if kind == "caption" else decode(written.ids(row, None)) for row in range(len(written))
    ]
    assert [text.removeprefix("<bos>").removesuffix("<eos>") for text in texts] == expected
    reasons = {f"{kind} empty": left_out[0], "text not readable": left_out[1]}
    assert entry["read"]["train"]["left_out"] == {reason: count for reason, count in reasons.items() if count}


@pytest.mark.parametrize("fields", [{}, {"image": "image"}])
def test_the_column_that_holds_nothing_is_named(run, tmp_path, fields):
    noise_images(1)[0].save(tmp_path / "0.png")
    rows = [{"maker": "noto", "label": label, "image": "0.png"} for label in (None, "apple")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    entry, _, _ = run(data=str(tmp_path / "d.jsonl"), text="{maker}: {label}", **fields)
    (left_out,) = entry["read"]["train"]["named"]
    assert (left_out["row"], left_out["detail"]) == (0, "nothing in ['label']")


@pytest.fixture
def tagged(run, tmp_path):
    """A source with lists that are just as long as a sequence, and the fields of it."""
    words = ["a", "castle", "fruit", "red"]
    noise_images(1)[0].save(tmp_path / "0.png")
    rows = [{"image": "0.png", "text": text, "tags": words} for text in ("a", "a", "b", "b")]
    rows[2]["tags"] = []
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    encoder = DocumentEncoder(tiny_processor())
    orders = {len(encoder.text_ids(", ".join(order))) for order in permutations(words)}
    num_words = len(encoder.text_ids(", ".join(words)))
    # in another order the first word, before which no space stands, is two tokens
    assert max(orders) > num_words
    fields = {"data": str(tmp_path / "d.jsonl"), "image": "image", "text": "text"}
    alternatives = {"alternatives": [{"text": "tags", "share": 1.0}]}
    run(sequence_length=num_words + 16 + 4, **fields, **alternatives)
    return fields, num_words + 16 + 4


@pytest.mark.parametrize("packed", [True, False])
def test_lists_in_another_order_are_no_longer_than_a_sequence(tagged, tmp_path, packed):
    _, length = tagged
    tokens = TokenFolder(tmp_path / "tokens", tiny_processor())
    stream = training_stream(DataFields(length, packed), tokens, tokens.sources(), 60, seed=0)
    decode = tiny_processor().tokenizer.decode
    texts = Counter()
    for example in (stream[index] for index in range(60)):
        assert len(example["input_ids"]) <= length
        texts[decode(example["input_ids"]).partition("castle")[0][-6:]] += 1
    # there are other orders than the stored one
    assert len(texts) > 2


def test_other_captions_than_the_tokenized_ones_have_to_fit(tagged, tmp_path, caplog):
    fields, length = tagged
    tokens = TokenFolder(tmp_path / "tokens", tiny_processor())

    def stream(text, longer=0):
        # as `run` tokenized them
        sources = read_sources({"mine": {"held_out": 0.0, **fields, "text": text}})
        return training_stream(DataFields(length + longer), tokens, sources, 10, seed=0)

    with pytest.raises(ValueError, match="'mine', row 0: a text of the recipe has .* over .*Tokenize anew"):
        stream("{text} of some more words than there were")
    stream("{text} of some more words than there were", longer=100)
    assert not caplog.records
    stream("tags")
    assert "1 of 4 rows hold nothing in a column of ['tags']" in caplog.text


@pytest.mark.parametrize("change", ["other rows", "one image", "nothing"])
def test_held_out_images_are_those_that_were_tokenized_or_none(run, tmp_path, caplog, change):
    def write(rows):
        (tmp_path / "d.csv").write_text("file,text\n" + "".join(f"{row % 6}.png,caption {row}\n" for row in rows))

    images = noise_images(6)
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    write(range(12))
    _, documents, _ = run(data=str(tmp_path / "d.csv"), image="file", text="text", held_out=0.5)
    if change == "other rows":
        write(range(12, 0, -1))
    processor = tiny_processor()
    if change == "one image":
        first, *others = read_held_out(str(tmp_path / "tokens"), processor, "validation")["mine"].captioned.captions
        numbers = [int(caption.removeprefix("caption ")) % 6 for caption in (first, *others)]
        (tmp_path / f"{next(number for number in numbers if number != numbers[0])}.png").unlink()
    captioned = read_held_out(str(tmp_path / "tokens"), processor, "validation")["mine"].captioned
    assert len(captioned) == len(documents["validation"]) > 2
    changed, missing = "d.csv' has changed since it was tokenized", "image missing: there is no file '"
    said = {"other rows": changed, "one image": missing, "nothing": None}[change]
    assert (captioned.images is None) == (said is not None)
    if said is None:
        shown = [images[int(caption.removeprefix("caption ")) % 6] for caption in captioned.captions]
        expected = processor.image_processor(shown, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(torch.cat(list(captioned.images)), expected)
    else:
        assert "Reconstructions stand in for the images of 'mine'" in caplog.text and said in caplog.text


def test_a_held_out_image_that_is_damaged_is_named_by_its_row(run, tmp_path):
    for index, image in enumerate(noise_images(6)):
        image.save(tmp_path / f"{index}.png")
    (tmp_path / "d.csv").write_text("file,text\n" + "".join(f"{row}.png,caption {row}\n" for row in range(6)))
    run(data=str(tmp_path / "d.csv"), image="file", text="text", held_out=0.5)
    captioned = read_held_out(str(tmp_path / "tokens"), tiny_processor(), "validation")["mine"].captioned
    row = captioned.captions[-1].removeprefix("caption ")
    (tmp_path / f"{row}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=f"^'mine', row {row}: image damaged: .* has changed since"):
        list(captioned.images)


@pytest.mark.parametrize("load", [{}, {"load": {"streaming": True}}])
def test_classes_are_read_by_their_names(tmp_path, load):
    for name, image in zip(("cat", "dog", "owl"), noise_images(3)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        image.save(tmp_path / "photos" / name / "0.png")
    (source,) = read_sources(
        {"mine": {"data": str(tmp_path / "photos"), "image": "image", "text": "a {label}", **load}}
    )
    assert list(source_texts([source], 10)) == ["a cat", "a dog", "a owl"]
    features = Features({"text": List(ClassLabel(names=["red", "blue"])), "one": ClassLabel(names=["red", "blue"])})
    rows = {"text": [[0, 1], [], [1]], "one": [1, None, -1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    for text, expected in (("text", ["red, blue", "blue"]), ("one", ["blue"])):
        (source,) = read_sources({"mine": {"data": str(tmp_path / "d.parquet"), "text": text, **load}})
        assert list(source_texts([source], 10)) == expected


@pytest.mark.parametrize("load", [{}, {"load": {"streaming": True}}])
def test_what_save_to_disk_writes_is_read(run, tmp_path, load):
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    rows = Dataset.from_dict({"image": noise_images(6), "label": [0, 1] * 3}, features=features)
    # a letter of patterns in the name, and several files
    folder = tmp_path / "saved [1]"
    DatasetDict(train=rows.select(range(4)), dev=rows.select([5])).save_to_disk(
        folder, num_shards={"train": 2, "dev": 1}
    )
    # a cache that lies beside the rows
    load_from_disk(folder)["train"].map(lambda row: {"label": 1 - row["label"]})
    assert list(folder.glob("train/cache-*.arrow"))
    fields = {"data": str(folder), "image": "image", "text": "a {label}", "splits": {"validation": "dev"}, **load}
    _, documents, _ = run(**fields)
    assert [documents["train"].caption(row) for row in range(4)] == ["a cat", "a dog"] * 2
    assert [documents["validation"].caption(row) for row in range(len(documents["validation"]))] == ["a dog"]
    # one of its splits is a data set of its own
    (source,) = read_sources({"one": {"data": str(folder / "train"), "image": "image", "text": "label", **load}})
    assert source.split_names() == {"train": "train"} and len(list(source_texts([source], 10))) == 4


def test_a_text_tokenizer_learns_from_no_row_that_is_held_out(tmp_path):
    lines = [f"line {number}" for number in range(40)]
    (tmp_path / "d.txt").write_text("\n".join(lines))
    (tmp_path / "held.txt").write_text("another\n")
    for load in ({}, {"streaming": True}):
        fields = {"data": str(tmp_path / "d.txt"), "text": "text", "held_out": 0.5, "load": load}
        (source,) = read_sources({"mine": fields})
        kept = [line for number, line in enumerate(lines) if not source.is_held_out(str(number))]
        assert 10 < len(kept) < 30 and list(source_texts([source], 10)) == kept[:10]
        # an own split is what is held out, then
        files = {"data_files": {"train": str(tmp_path / "d.txt"), "validation": str(tmp_path / "held.txt")}}
        (source,) = read_sources({"mine": {**fields, "data": "text", "load": {**load, **files}}})
        assert list(source_texts([source], 40)) == lines


def test_the_mark_of_an_editor_is_no_character(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    for load in ({}, {"load": {"streaming": True}}):
        (source,) = read_sources({"mine": {"data": str(tmp_path / "d.txt"), "text": "text", **load}})
        assert list(source_texts([source], 10)) == ["one", "two"]


@pytest.mark.parametrize("name", ["e.txt", "e.jsonl", "e.parquet"])
def test_an_empty_file_is_refused(run, tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="'mine'"):
        run(data=str(tmp_path / name), text="text")


def test_source_whose_only_row_is_held_out_says_so(run, tmp_path):
    (tmp_path / "d.txt").write_text("a line\n")
    with pytest.raises(ValueError, match="of 1 rows 1 held out .`held_out: 0` holds out none"):
        run(data=str(tmp_path / "d.txt"), text="text", held_out=0.999)


@pytest.mark.parametrize("load", [{}, {"streaming": True}])
def test_a_broken_line_stops_with_its_row(run, tmp_path, load):
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"\n')
    with pytest.raises(InputError, match="sources: .*JSON parse error: .* in row 2"):
        run(data=str(tmp_path / "d.jsonl"), text="text", load=load)


@pytest.mark.parametrize("files", [1, 3])
def test_held_out_rows_of_a_stream_are_those_of_the_image_tokenizer(run, tmp_path, caplog, files):
    features, drawn = Features({"image": Image(), "label": Value("string")}), []
    for shard in range(files):
        rows = {"image": noise_images(30), "label": [f"thing {30 * shard + row}" for row in range(30)]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{shard}.parquet")
    fields = {"data": str(tmp_path / "*.parquet"), "image": "image", "text": "label", "held_out": 0.2}
    for load in ({}, {"load": {"streaming": True}}):
        (source,) = read_sources({"mine": {**fields, **load}})
        held_out = {f"thing {entry.row}" for entry in candidates(source) if entry.is_held_out}
        _, documents, _ = run(**fields, **load)
        told = documents["validation"]
        assert {told.caption(row) for row in range(len(told))} == held_out and 1 < len(held_out) < 40
        shutil.rmtree(tmp_path / "tokens")
        drawn.append(held_out)
    # nobody knows how many rows stand in the files before
    assert (drawn[0] == drawn[1]) == (files == 1) == ("held out than without `streaming`" not in caplog.text)


@pytest.mark.parametrize("name", ["chats", "web", "photos", "own"])
def test_held_out_rows_of_kinds_in_turn_are_of_all_kinds(name):
    (source,) = read_sources({name: {"data": "d.txt", "text": "text"}})
    for rows, kinds in ((2000, 4), (5000, 10)):
        drawn = Counter(row % kinds for row in range(rows) if source.is_held_out(str(row)))
        assert sum(drawn.values()) == pytest.approx(0.02 * rows, abs=4 * (0.02 * rows) ** 0.5)
        assert len(drawn) == kinds and max(drawn.values()) < 0.5 * sum(drawn.values())


def test_missing_image_of_a_page_is_no_row_left_out(run, tmp_path):
    page = [{"text": "before"}, {"image": "gone.png"}, {"text": "after"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"page": page}) + "\n")
    entry, documents, printed = run(data=str(tmp_path / "d.jsonl"), segments="page")
    read = entry["read"]["train"]
    assert len(documents["train"]) == read["rows"] == 1
    assert (read["left_out"], read.get("images_left_out")) == ({}, {"image missing": 1})
    assert "images left out of 1 rows: 1 image missing" in printed and "gone.png" in printed


@pytest.mark.parametrize("images, expected", [(0, []), (4, [0, 3, 6, 9]), (20, list(range(12)))])
def test_sampled_images_are_spread(images, expected):
    processor = tiny_processor()
    documents = tiny_documents(processor, 12)
    sampling = SampleCallback(SampleFields(every=1, images=images), processor, [documents], MomaMetricsCallback())
    assert sampling.references == [documents.caption(row) for row in expected]
    assert len(sampling.codes) == len(expected)


def table_texts(data, **load):
    (source,) = read_sources({"mine": {"data": str(data), "text": "text", "load": load}})
    return list(source.open("train")["text"])


@pytest.mark.parametrize("name, separator", [("d.csv", ","), ("d.tsv", "\t")])
def test_a_table_whose_first_row_is_longer_than_its_header_is_refused(tmp_path, name, separator):
    lines = "id,text\n\n1,Hello, world\n2,plain\n".replace(",", separator)
    (tmp_path / name).write_text(lines)
    with pytest.raises(InputError, match=r"first row of '.*d\..sv' has 3 fields, and its header names 2, .*index_col"):
        table_texts(tmp_path / name)
    with pytest.raises(InputError, match="has 3 fields"):
        table_texts(tmp_path / f"*.{name[2:]}")


def test_a_table_that_says_what_its_rows_begin_or_end_with_is_read(tmp_path):
    (tmp_path / "d.csv").write_text("text,size\nfirst,red,1\nsecond,blue,2\n")
    assert table_texts(tmp_path / "d.csv", index_col=0) == ["red", "blue"]
    (tmp_path / "d.csv").write_text("text,size\nred,1,\nblue,2,\n")
    assert table_texts(tmp_path / "d.csv", index_col=False) == ["red", "blue"]


@pytest.mark.parametrize("form", ["folder", "reader", "stream"])
def test_texts_of_tables_in_a_folder_are_the_characters_that_stand_there(tmp_path, form):
    words = ["007", "NA", "1.50"]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.csv").write_text("\n".join(["text", *words]) + "\n")
    data, load = str(tmp_path / "rows"), {"streaming": True} if form == "stream" else {}
    if form == "reader":
        data, load = "csv", {"data_files": f"{tmp_path}/rows/train.csv"}
    assert table_texts(data, **load) == words
    (tmp_path / "rows" / "train.csv").write_text("id,text\n1,Hello, world\n")
    with pytest.raises(InputError, match="has 3 fields"):
        table_texts(data, **load)


def test_commas_in_quotes_and_other_separators_are_no_further_fields(tmp_path):
    (tmp_path / "d.csv").write_text('text,size\n"red, round",1\n"two\nlines",2\n')
    assert table_texts(tmp_path / "d.csv") == ["red, round", "two\nlines"]
    (tmp_path / "d.csv").write_text("text;size\nred, round;1\n")
    assert table_texts(tmp_path / "d.csv", sep=";") == ["red, round"]
