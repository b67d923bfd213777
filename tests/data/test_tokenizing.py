# SPDX-License-Identifier: Apache-2.0
"""Tokenizing sources: every kind and form, bad rows left out and counted, restarts, and several processes."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import struct
import tarfile
import time
import zipfile
import zlib
from datetime import date
from io import BytesIO

import numpy as np
import pytest
import tokenizers
from datasets import Dataset, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from datasets.utils import file_utils
from PIL import Image
from transformers import PreTrainedTokenizerFast

from helpers.tiny import noise_images, tiny_processor
from modeling_moma.data.documents import TokenFolder
from modeling_moma.data.encoding import DocumentEncoder, caption_chat_template
from modeling_moma.data.images import SkippedRow, read_image
from modeling_moma.data.jobs import plan_job, read_job, read_manifest, source_digest, write_job, write_manifest
from modeling_moma.data.sources import read_sources
from modeling_moma.data.tokenizing import run_tasks, tokenize_shard
from modeling_moma.errors_moma import InputError
from modeling_moma.utils.errors import KilledProcessError


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    tiny_processor().save_pretrained(folder)
    return str(folder)


def tokenize(sources, processor, output, processes=1, strict=False, packed=True, sequence_length=64, **options):
    job = plan_job(read_sources(sources), processor, sequence_length, packed, seed=0, **options)
    write_job(output, job)
    run_tasks(output, job, processes, strict=strict)
    return write_manifest(output, job)


def documents(folder, source, split="train"):
    tokens = TokenFolder(folder, tiny_processor())
    entry = next(entry for entry in tokens.sources() if entry.name == source)
    return tokens.documents(entry, split)


def write_photos(folder, images, captions, column="caption"):
    """A folder of images, as a camera or a download leaves it, and its `metadata.csv`."""
    folder.mkdir(exist_ok=True)
    names = [f"DSC_{index:04d}.jpg" for index in range(len(images))]
    for name, image in zip(names, images):
        image.save(folder / name, format="PNG")
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", column])
        writer.writerows(zip(names, captions))
    return names


def words(documents, row=0):
    ids = documents.ids(row, np.random.default_rng(0))
    return tiny_processor().tokenizer.decode(ids)


def test_folder_with_an_archive_of_photos(processor, tmp_path):
    names = write_photos(tmp_path / "loose", noise_images(4), ["red"] * 4)
    (tmp_path / "photos").mkdir()
    path = tmp_path / "photos" / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("metadata.csv", *names):
            archive.write(tmp_path / "loose" / name, name)
    fields = {"data": str(tmp_path / "photos"), "image": "image", "text": "caption", "held_out": 0}
    entry = tokenize({"photos": fields}, processor, tmp_path / "tokens", strict=True)["sources"]["photos"]
    assert entry["splits"]["train"]["documents"] == 4
    with pytest.raises(SkippedRow, match="image missing: there is no file 'zip://gone.jpg::"):
        read_image({"bytes": None, "path": f"zip://gone.jpg::{path}"})


def test_no_program_is_started_for_an_image_in_a_row():
    postscript = BytesIO()
    noise_images(1)[0].save(postscript, "EPS")
    with pytest.raises(SkippedRow, match=r"image damaged: .* bytes cannot be opened .* damaged or of another kind"):
        read_image({"bytes": postscript.getvalue(), "path": None})


@pytest.mark.parametrize("form", [lambda path: path, lambda path: {"bytes": None, "path": path}])
@pytest.mark.parametrize(
    "path", ["zip://0.png::http://127.0.0.1/a.zip", "file:///0.png", "zip://0.png::file:///a.zip", "zip://0.png"]
)
def test_addresses_of_other_readers_are_not_opened(monkeypatch, form, path):
    monkeypatch.setattr(file_utils, "xopen", lambda *args: pytest.fail("opened"))
    with pytest.raises(SkippedRow, match="image missing: there is no file"):
        read_image(form(path))


def test_a_missing_image_names_the_folder_it_was_looked_for_in(tmp_path):
    with pytest.raises(SkippedRow, match="there is no file '0.png' below '.*'$"):
        read_image("0.png", str(tmp_path))
    with pytest.raises(
        SkippedRow, match=r"there is no file '0.png' below 'pt/\*'; `root` of the source names the folder"
    ):
        read_image("0.png", "pt/*")


def test_codes_are_those_of_the_processor(processor, tmp_path):
    images = noise_images(5)
    write_photos(tmp_path / "photos", images, "abcde")
    fields = {"data": str(tmp_path / "photos"), "image": "image", "text": "{caption}", "held_out": 0, "codings": 3}
    tokenize({"photos": fields}, processor, tmp_path / "tokens")
    train = documents(tmp_path / "tokens", "photos")
    assert train.num_codings == 3
    assert [train.codes(row).tolist() for row in range(5)] == tiny_processor().encode_images(images)


def image_bytes(index=0, side=16):
    buffer = BytesIO()
    noise_images(index + 1, side)[index].save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path):
    with tarfile.open(path, "w") as archive:
        for index in range(3):
            for ending, content in (("png", image_bytes(index)), ("txt", f"cap {index}".encode())):
                entry = tarfile.TarInfo(f"{index}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, BytesIO(content))


@pytest.mark.parametrize("streaming", [False, True])
def test_tar_and_parquet_and_json_lines(processor, tmp_path, streaming):
    write_tar(tmp_path / "w.tar")
    rows = {"image": [{"bytes": image_bytes(index), "path": None} for index in range(3)], "label": ["a", "b", "c"]}
    features = Features({"image": ImageFeature(), "label": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "p.parquet")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(image_bytes(0))
    segments = [{"type": "text", "text": "one"}, {"type": "image", "image": "pictures/0.png"}, {"text": "two"}]
    lines = [json.dumps({"segments": segments}), json.dumps({"segments": ["only words"]})]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    (tmp_path / "t.txt").write_text("first line\n\nsecond line\n")
    load = {"load": {"streaming": True}} if streaming else {}
    sources = {
        "tar": {"data": str(tmp_path / "w.tar"), "image": "png", "text": "txt"},
        "parquet": {"data": str(tmp_path / "p.parquet"), "image": "image", "text": "{label}!"},
        "documents": {"data": str(tmp_path / "d.jsonl"), "segments": "segments"},
        "plain": {"data": str(tmp_path / "t.txt"), "text": "text"},
    }
    sources = {name: {**fields, **load, "held_out": 0} for name, fields in sources.items()}
    manifest = tokenize(sources, processor, tmp_path / "tokens")
    counts = {name: entry["splits"]["train"]["documents"] for name, entry in manifest["sources"].items()}
    assert counts == {"tar": 3, "parquet": 3, "documents": 2, "plain": 2}
    assert documents(tmp_path / "tokens", "parquet").caption(1) == "b!"
    text = words(documents(tmp_path / "tokens", "documents"))
    assert text.startswith("<bos>one<|begin_image|>") and text.endswith("<|end_image|>two<eos>")
    assert words(documents(tmp_path / "tokens", "documents"), 1) == "<bos>only words<eos>"
    assert words(documents(tmp_path / "tokens", "plain"), 1) == "<bos>second line<eos>"
    assert manifest["sources"]["plain"]["read"]["train"]["left_out"] == {"text empty": 1}


def test_messages_of_trl_with_images(processor, tmp_path):
    chat = [
        {"role": "user", "content": "what is <image> this <eos>"},
        {"role": "assistant", "content": "an apple"},
    ]
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"messages": List(message), "images": List(ImageFeature())})
    rows = {"messages": [chat, chat], "images": [[{"bytes": image_bytes(), "path": None}], []]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "chat.parquet")
    fields = {"data": str(tmp_path / "chat.parquet"), "messages": "messages", "images": "images", "held_out": 0}
    manifest = tokenize({"chat": fields}, processor, tmp_path / "tokens")
    assert manifest["sources"]["chat"]["read"]["train"]["left_out"] == {"images missing in chat": 1}
    ids = documents(tmp_path / "tokens", "chat").ids(0, np.random.default_rng(0)).tolist()
    image = {"type": "image", "image": noise_images(1)[0]}
    parts = [{"type": "text", "text": "what is "}, image, {"type": "text", "text": " this <eos>"}]
    expected = tiny_processor().apply_chat_template(
        [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "an apple"}]}],
        tokenize=True,
        return_dict=True,
        sanitize_control_tokens=True,
    )["input_ids"]
    assert ids == expected[0]


def write_chats(path, *chats):
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return {"chat": {"data": str(path), "messages": "messages", "held_out": 0}}


def said(*roles, **more):
    return [{"role": role, "content": f"{role} says", **more} for role in roles]


def test_a_chat_that_calls_a_function_is_left_out(processor, tmp_path):
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}]
    sources = write_chats(tmp_path / "chat.jsonl", said("user", "assistant"), said("user") + calls)
    read = tokenize(sources, processor, tmp_path / "tokens")["sources"]["chat"]["read"]["train"]
    assert read["left_out"] == {"chat not readable": 1} and "'tool_calls'" in read["named"][0]["detail"]


def test_a_template_of_captions_takes_no_longer_chats_and_tells(tmp_path, caplog):
    processor = tiny_processor()
    processor.chat_template = caption_chat_template()
    processor.save_pretrained(tmp_path / "processor")
    chats = [said("user", "assistant"), said("system", "user", "assistant"), said("user", "assistant", "user")]
    sources = write_chats(tmp_path / "chat.jsonl", *chats)
    read = tokenize(sources, str(tmp_path / "processor"), tmp_path / "tokens")["sources"]["chat"]["read"]["train"]
    assert read["left_out"] == {"chat not readable": 2} and "['system', 'user'" in read["named"][0]["detail"]
    assert "there are chats, and the processor's chat template is that of captions" in caplog.text


def test_chats_of_another_template_do_not_mix_into_a_folder(processor, tmp_path):
    sources = write_chats(tmp_path / "chat.jsonl", *[said("user", "assistant")] * 3)
    other = tiny_processor()
    other.chat_template += "{# changed #}"
    other.save_pretrained(tmp_path / "other")
    tokenize(sources, processor, tmp_path / "tokens")
    with pytest.raises(ValueError, match="begun with another chat_template"):
        tokenize(sources, str(tmp_path / "other"), tmp_path / "tokens")
    # of captions and texts no template decides
    (tmp_path / "lines.txt").write_text("red\napple\n")
    lines = {"lines": {"data": str(tmp_path / "lines.txt"), "text": "text", "held_out": 0}}
    for folder in (processor, str(tmp_path / "other")):
        tokenize(lines, folder, tmp_path / "of lines")


def test_a_tokenizer_with_special_tokens_among_its_words_is_refused():
    processor = tiny_processor()
    words = ["</s>", "<s>", "<unk>", "row", "has"]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>", eos_token="</s>", bos_token="<s>"
    )
    processor.token_layout = lambda: {"eos_token_id": 0}
    # words that it does not know are no reason
    assert processor.tokenizer("never")["input_ids"] == [processor.tokenizer.unk_token_id]
    with pytest.raises(InputError, match="a WordLevel, reads '<s>' in a text as the special token"):
        DocumentEncoder(processor)


def bomb():
    """An image of 20,000 times 20,000 pixels in some dozens of bytes."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def write_bad_photos(folder):
    """A folder with everything that goes wrong; the captions say what."""
    folder.mkdir()
    good = noise_images(1, 32)[0]

    def saved(image, format, **options):
        buffer = BytesIO()
        image.save(buffer, format=format, **options)
        return buffer.getvalue()

    jpeg = saved(good, "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "good": jpeg,
        "truncated": jpeg[: len(jpeg) // 2],
        "zero bytes": b"",
        "cmyk": saved(good.convert("CMYK"), "JPEG"),
        "sixteen": saved(Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60), "PNG"),
        "animated": saved(good, "GIF", save_all=True, append_images=[good.rotate(90)]),
        "rotated": saved(good, "JPEG", exif=exif),
        "one pixel": saved(good.crop((0, 0, 1, 1)), "PNG"),
        "bomb": bomb(),
        "empty": jpeg,
        "special": jpeg,
        "long": jpeg,
    }
    captions = {name: name for name in files} | {
        "empty": " ",
        "special": "an <image> and <eos> and <|image_3|>",
        "long": "word " * 200,
    }
    rows = [(f"{name}.jpg", captions[name]) for name in files] + [("missing.jpg", "missing")]
    for name, content in files.items():
        (folder / f"{name}.jpg").write_bytes(content)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])


LEFT_OUT = {
    "image damaged": 2,
    "image too small": 1,
    "image too large": 1,
    "image missing": 1,
    "caption empty": 1,
    "caption too long": 1,
}


@pytest.fixture
def bad_photos(tmp_path):
    write_bad_photos(tmp_path / "photos")
    return {"photos": {"data": str(tmp_path / "photos"), "image": "image", "text": "text", "held_out": 0}}


def test_bad_rows_are_left_out_counted_and_named(processor, bad_photos, tmp_path):
    manifest = tokenize(bad_photos, processor, tmp_path / "tokens", sequence_length=96)
    read = manifest["sources"]["photos"]["read"]["train"]
    assert read["left_out"] == LEFT_OUT
    assert read["changed"] == {"CMYK": 1, "16 bit": 1, "animated": 1, "EXIF-rotated": 1}
    assert {row["reason"] for row in read["named"]} == set(LEFT_OUT)
    assert any("missing.jpg" in row["detail"] for row in read["named"])
    train = documents(tmp_path / "tokens", "photos")
    captions = [train.caption(row) for row in range(len(train))]
    assert captions == ["good", "cmyk", "sixteen", "animated", "rotated", "an <image> and <eos> and <|image_3|>"]


def test_special_tokens_in_a_caption_are_words(processor, bad_photos, tmp_path):
    tokenize(bad_photos, processor, tmp_path / "tokens", sequence_length=96)
    train, tokens = documents(tmp_path / "tokens", "photos"), tiny_processor()
    ids = train.encoder.caption(train.caption(5), train.codes(5), True)
    assert (ids.count(tokens.tokenizer.eos_token_id), ids.count(tokens.image_token_id)) == (1, 0)
    end = ids.index(tokens.end_image_token_id)
    assert not set(ids[end + 1 : -1]) & {*tokens.tokenizer.all_special_ids, *tokens.image_token_ids}
    assert tokens.tokenizer.decode(ids[end + 1 : -1]) == "an <image> and <eos> and <|image_3|>"


def test_strict_stops_at_the_first_bad_row_and_names_it(processor, bad_photos, tmp_path):
    with pytest.raises(ValueError, match="'photos', split 'train', row 1: image damaged.*--strict") as refused:
        tokenize(bad_photos, processor, tmp_path / "tokens", strict=True)
    assert ".." not in str(refused.value)
    assert not list((tmp_path / "tokens").rglob("*.arrow"))


@pytest.mark.parametrize("as_bytes", [True, False])
def test_what_is_no_image_is_told_without_an_address_in_memory(tmp_path, as_bytes):
    (tmp_path / "notes.png").write_bytes(b"no image at all")
    with pytest.raises(SkippedRow, match="image damaged: .*of another kind") as refused:
        read_image(b"no image at all" if as_bytes else str(tmp_path / "notes.png"))
    assert "BytesIO" not in str(refused.value)


def test_source_of_nothing_is_refused_with_its_reasons(processor, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n\n")
    with pytest.raises(ValueError, match="'plain' yields nothing to train on: of 3 rows 3 text empty"):
        tokenize({"plain": {"data": str(tmp_path / "t.txt"), "text": "text"}}, processor, tmp_path / "tokens")
    Dataset.from_dict({"text": []}, features=Features({"text": Value("string")})).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(ValueError, match="'none'.*no data"):
        tokenize({"none": {"data": str(tmp_path / "e.parquet"), "text": "text"}}, processor, tmp_path / "other")


def test_rows_of_their_own_must_fit_and_packed_ones_need_not(processor, tmp_path):
    (tmp_path / "t.txt").write_text("short\n" + "long " * 100 + "\n")
    source = {"plain": {"data": str(tmp_path / "t.txt"), "text": "text", "held_out": 0}}
    manifest = tokenize(source, processor, tmp_path / "rows", packed=False)
    assert manifest["sources"]["plain"]["read"]["train"]["left_out"] == {"document too long": 1}
    assert tokenize(source, processor, tmp_path / "packed")["sources"]["plain"]["splits"]["train"]["documents"] == 2


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A source of several shards, with changed images."""
    folder = tmp_path_factory.mktemp("many")
    images = noise_images(300)
    rows = {"image": images, "label": [f"thing {index}" for index in range(300)]}
    Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": Value("string")})).to_parquet(
        folder / "train.parquet"
    )
    return {"many": {"data": str(folder / "train.parquet"), "image": "image", "text": "label", "codings": 2}}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.arrow"))}


def write_stories(folder, stories, images):
    """Documents of so many images each."""
    for index, image in enumerate(noise_images(images)):
        image.save(folder / f"{index}.png")
    parts = [{"image": f"{index}.png"} for index in range(images)]
    rows = [json.dumps({"segments": [f"story {number}", *parts]}) for number in range(stories)]
    (folder / "stories.jsonl").write_text("\n".join(rows))
    return {"stories": {"data": str(folder / "stories.jsonl"), "segments": "segments", "held_out": 0}}


def test_shards_are_of_images_whatever_rows_hold(processor, tmp_path):
    """Rows of many images, or of long texts, are the work of several processes."""
    stories = plan_job(read_sources(write_stories(tmp_path, 60, 40)), processor, 64, True, 0)
    entry = stories.splits["stories"]["train"]
    # 256 images are those of six stories
    assert (entry["rows_per_shard"], entry["shards"]) == (6, 10) and entry["images"] == 2400
    (tmp_path / "lines.txt").write_text("a line\n" * 2000)
    (tmp_path / "long.txt").write_text(("word " * 20_000 + "\n") * 100)
    shards = {}
    for name in ("lines", "long"):
        sources = {name: {"data": str(tmp_path / f"{name}.txt"), "text": "text"}}
        shards[name] = plan_job(read_sources(sources), processor, 64, True, 0).splits[name]["train"]["shards"]
    assert shards["lines"] == 2 and shards["long"] > 1


def test_two_processes_write_the_documents_of_one(processor, tmp_path, capsys):
    sources = write_stories(tmp_path, 30, 20)
    tokenize(sources, processor, tmp_path / "one")
    bar = capsys.readouterr().err
    tokenize(sources, processor, tmp_path / "two", processes=2)
    assert len(contents(tmp_path / "one")) == 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (tmp_path / "one" / "manifest.json").read_text() == (tmp_path / "two" / "manifest.json").read_text()
    # both count shards
    for told in (bar, capsys.readouterr().err):
        assert "0/3" in told and "3/3" in told and "shards" in told


def test_shards_are_as_if_there_were_one(processor, many, tmp_path):
    tokenize(many, processor, tmp_path / "three", rows_per_shard=128)
    tokenize(many, processor, tmp_path / "one", rows_per_shard=384)
    three, one = documents(tmp_path / "three", "many"), documents(tmp_path / "one", "many")
    assert len(three) == len(one)
    for row in range(len(one)):
        assert [three.codes(row, coding).tolist() for coding in range(2)] == [
            one.codes(row, coding).tolist() for coding in range(2)
        ]


def test_other_settings_do_not_mix_into_a_folder(processor, many, tmp_path):
    tokenize(many, processor, tmp_path, rows_per_shard=128)
    other = {"many": {**many["many"], "codings": 3}}
    with pytest.raises(ValueError, match="begun with another sources: many: codings: 2 then, 3 now"):
        tokenize(other, processor, tmp_path, rows_per_shard=128)
    with pytest.raises(ValueError, match="begun with another splits: many: train: rows_per_shard: 128 then, 256 now"):
        tokenize(many, processor, tmp_path, rows_per_shard=256)
    other_processor = tiny_processor(codes=16)
    with pytest.raises(ValueError, match="tokenized with another processor"):
        TokenFolder(tmp_path, other_processor)
    assert read_job(tmp_path).sources["many"]["codings"] == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_the_same_size_that_changed_do_not_mix_into_a_folder(processor, tmp_path, streaming):
    data, output = tmp_path / "t.txt", tmp_path / "tokens"
    data.write_text("one\ntwo\n")
    lines = {"lines": {"data": str(data), "text": "text", "held_out": 0, "load": {"streaming": streaming}}}
    written, then = tokenize(lines, processor, output), data.stat().st_mtime
    # at another place, too
    (tmp_path / "moved").mkdir()
    copy = shutil.copy(data, tmp_path / "moved")
    (one,), (other,) = read_sources(lines), read_sources({"lines": {**lines["lines"], "data": str(copy)}})
    assert source_digest(one) == source_digest(other)
    data.write_text("two\none\n")
    os.utime(data, (then, then))
    with pytest.raises(ValueError, match="tokens of 'lines', whose files have changed since"):
        tokenize(lines, processor, output)
    data.write_text("one\ntwo\n")
    assert tokenize(lines, processor, output) == written


def test_files_that_load_names_are_known_again(processor, tmp_path):
    data, output = tmp_path / "t.txt", tmp_path / "tokens"
    data.write_text("one\ntwo\n")
    lines = {"lines": {"data": "text", "text": "text", "held_out": 0, "load": {"data_files": str(data)}}}
    tokenize(lines, processor, output)
    data.write_text("two\none\n")
    with pytest.raises(ValueError, match="tokens of 'lines', whose files have changed since"):
        tokenize(lines, processor, output)


def test_images_that_changed_their_place_do_not_mix_into_a_folder(processor, tmp_path):
    folder = tmp_path / "fruit"
    for name in ("apple", "pear"):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(noise_images(2)):
            image.save(folder / name / f"{number}.png")
    fruit = {"fruit": {"data": str(folder), "image": "image", "text": "label", "held_out": 0}}
    # what lies beside the images and is none of them does not matter
    written = tokenize(fruit, processor, tmp_path / "tokens")
    (folder / "README.md").write_text("fruit")
    (folder / "gone.png.txt").symlink_to("nowhere")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "list.json").write_text("{}")
    assert tokenize(fruit, processor, tmp_path / "tokens") == written
    (folder / "apple").rename(folder / "zapple")
    with pytest.raises(ValueError, match="tokens of 'fruit', whose files have changed since"):
        tokenize(fruit, processor, tmp_path / "tokens")


def test_a_shard_whose_file_or_report_is_gone_or_torn_is_written_again(processor, many, tmp_path):
    tokenize(many, processor, tmp_path, rows_per_shard=128)
    expected = contents(tmp_path)
    (tmp_path / "many" / "train-00000-of-00003.arrow").unlink()
    (tmp_path / "many" / "train-00001-of-00003.json").write_text('{"rows"')
    (tmp_path / "many" / "train-00002-of-00003.json").write_text("")
    with pytest.raises(ValueError, match="train-00000-of-00003.arrow' cannot be read .*copied in part"):
        documents(tmp_path, "many")
    tokenize(many, processor, tmp_path, rows_per_shard=128)
    assert contents(tmp_path) == expected
    file = tmp_path / "many" / "train-00000-of-00003.arrow"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="train-00000-of-00003.arrow' cannot be read"):
        documents(tmp_path, "many")
    for text in ("", "[]"):
        (tmp_path / "job.json").write_text(text)
        with pytest.raises(ValueError, match="job.json': it .*changed by hand"):
            tokenize(many, processor, tmp_path, rows_per_shard=128)


def test_workers_find_a_processor_that_was_moved(processor, many, tmp_path):
    moved = tmp_path / "moved"
    expected = tokenize(many, processor, tmp_path / "tokens", rows_per_shard=128)
    shutil.copytree(processor, moved)
    began = (tmp_path / "tokens" / "job.json").stat().st_mtime
    for number in (0, 1):
        (tmp_path / "tokens" / "many" / f"train-0000{number}-of-00003.json").unlink()
    assert tokenize(many, str(moved), tmp_path / "tokens", processes=2, rows_per_shard=128) == expected
    assert read_job(tmp_path / "tokens").processor == str(moved)
    assert (tmp_path / "tokens" / "job.json").stat().st_mtime == began


def test_a_split_that_has_another_name_is_read_once(processor, tmp_path):
    for name in ("training", "dev", "other"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} {row}"}) + "\n" for row in range(9))
        )
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("training", "dev", "other")}
    source = {"data": "json", "text": "text", "load": {"data_files": files}}
    source["splits"] = {"train": "training", "validation": "dev"}
    read = tokenize({"mine": source}, processor, tmp_path / "tokens")["sources"]["mine"]["splits"]
    assert {name: entry["documents"] for name, entry in read.items()} == {"train": 9, "validation": 9, "other": 9}


def test_training_rows_are_held_out_only_where_there_is_no_validation(processor, tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{row}"}) + "\n" for row in range(20)))
    own = {"data": str(tmp_path), "text": "text", "held_out": 0.5}
    drawn = {**own, "data": str(tmp_path / "train.jsonl")}
    sources = {"own": own, "drawn": drawn}
    found = tokenize(sources, processor, tmp_path / "tokens", splits=["train"])["sources"]
    assert {name: entry["documents"] for name, entry in found["own"]["splits"].items()} == {"train": 20}
    assert found["drawn"]["splits"].keys() == {"train", "validation"}
    with pytest.raises(ValueError, match="--splits train vlaidation: no source has a split 'vlaidation': 'own' has"):
        tokenize(sources, processor, tmp_path / "other", splits=["train", "vlaidation"])


def test_tokens_of_another_kind_than_the_recipe_names_are_refused(processor, many, tmp_path):
    tokenize(many, processor, tmp_path, rows_per_shard=384)
    tokens = TokenFolder(tmp_path, tiny_processor())
    (texts,) = read_sources({"many": {"data": "nowhere", "text": "label"}})
    with pytest.raises(ValueError, match="has 'many' as a source of caption data, and the recipe as one of text data"):
        tokens.documents(texts)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"image": "other"}, "image = 'image', and the recipe has 'other'"),
        ({"codings": 3}, "codings = 2, and the recipe has 3"),
    ],
)
def test_captions_of_other_images_than_were_coded_are_refused(processor, many, tmp_path, change, names):
    tokenize(many, processor, tmp_path, rows_per_shard=384)
    tokens = TokenFolder(tmp_path, tiny_processor())
    (source,) = read_sources({"many": {**many["many"], **change}})
    with pytest.raises(ValueError, match=f"'many' was tokenized with {names}"):
        tokens.documents(source)


def test_texts_of_another_column_are_refused_and_other_data_told(processor, tmp_path, caplog):
    rows = [{"body": f"red apple {number}", "title": f"castle {number}"} for number in range(9)]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"data": str(tmp_path / "two.jsonl"), "text": "body"}
    tokenize({"two": fields}, processor, tmp_path / "tokens")
    tokens = TokenFolder(tmp_path / "tokens", tiny_processor())
    (other,) = read_sources({"two": {**fields, "text": "title"}})
    with pytest.raises(ValueError, match="'two' was tokenized with text = 'body', and the recipe has 'title'"):
        tokens.documents(other)
    (moved,) = read_sources({"two": {**fields, "data": "elsewhere.jsonl", "weight": 3.0}})
    assert len(tokens.documents(moved)) == 9
    assert "were made with data = " in caplog.text and "weight" not in caplog.text


def kill_own_process(*_):
    os._exit(9)


def wait_with_ctrl_c_ignored(*_):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        time.sleep(600)


@pytest.mark.parametrize(
    "work, error, expected",
    [
        (kill_own_process, None, pytest.raises(KilledProcessError, match="was killed.*goes on")),
        # Ctrl-C is for the first process alone, which ends the others
        (wait_with_ctrl_c_ignored, KeyboardInterrupt, pytest.raises(KeyboardInterrupt)),
        (wait_with_ctrl_c_ignored, InputError("row 1"), pytest.raises(InputError, match="row 1")),
    ],
    ids=["killed", "stopped", "refused"],
)
def test_what_ends_one_process_ends_all_and_the_same_command_goes_on(
    processor, tmp_path, monkeypatch, work, error, expected
):
    (tmp_path / "t.txt").write_text("one\ntwo\nthree\n" * 20)
    sources = read_sources({"lines": {"data": str(tmp_path / "t.txt"), "text": "text", "held_out": 0}})
    job = plan_job(sources, processor, 64, True, seed=0, rows_per_shard=10)
    write_job(tmp_path / "tokens", job)
    # a job of a shell without a terminal may ignore it
    before = signal.getsignal(signal.SIGINT)

    def tokenize_first(*args):
        if error is not None:
            raise error
        return tokenize_shard(*args)

    with monkeypatch.context() as patch, expected:
        patch.setattr("modeling_moma.data.tokenizing._run_one", work)
        patch.setattr("modeling_moma.data.tokenizing.tokenize_shard", tokenize_first)
        run_tasks(tmp_path / "tokens", job, 2)
    assert signal.getsignal(signal.SIGINT) == before and not multiprocessing.active_children()
    run_tasks(tmp_path / "tokens", job, 1)
    write_manifest(tmp_path / "tokens", job)
    assert len(documents(tmp_path / "tokens", "lines")) == 60


def test_a_file_that_is_written_after_its_tokens_is_told(processor, tmp_path, caplog):
    rows = tmp_path / "data" / "t.txt"
    rows.parent.mkdir()
    rows.write_text("one\ntwo\n")
    for number, data in enumerate((rows, rows.parent, rows.parent / "*.txt")):
        lines = {"lines": {"data": str(data), "text": "text", "held_out": 0}}
        written = tokenize(lines, processor, tmp_path / f"{number}")
        caplog.clear()
        assert tokenize(lines, processor, tmp_path / f"{number}") == written and "was written after" not in caplog.text
        later = time.time() + 10
        os.utime(rows, (later, later))
        assert tokenize(lines, processor, tmp_path / f"{number}") == written
        (told,) = [record.message for record in caplog.records if "was written after" in record.message]
        assert told.startswith(f"sources: 'lines': {str(rows)!r}") and "give a new folder" in told
        earlier = rows.stat().st_mtime - 100
        os.utime(rows, (earlier, earlier))


def test_sources_of_the_same_rows_that_hold_out_others_are_told(processor, tmp_path, caplog):
    folder = tmp_path / "lines"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text("".join(f"line {row}\n" for row in range(20)))
    parts = {"splits": {"train": "train[:80%]", "validation": "train[80%:]"}}

    def warnings(**sources):
        fields = {name: {"text": "text", "held_out": 0.2, **entry} for name, entry in sources.items()}
        plan_job(read_sources(fields), processor, 64, True, 0)
        found = [record.message for record in caplog.records if "same files" in record.message]
        caplog.clear()
        return found

    one, any_of = {"data": str(folder / "one.txt")}, {"data": str(folder / "*.txt")}
    (said,) = warnings(a=one, b=any_of)
    assert said.startswith("sources: 'a' and 'b' read the same files") and "train[98%:]" in said
    assert len(warnings(a=one, b={**one, "held_out": 0})) == 1
    assert len(warnings(a={"data": str(folder)}, b=one)) == 1
    # of the two, one alone draws none of its own
    assert len(warnings(a={**one, **parts}, b=one)) == len(warnings(a={**one, **parts}, b={**one, "held_out": 0})) == 1
    assert len(warnings(a={**one, **parts}, b={**any_of, **parts})) == 1
    assert not warnings(a=one, b={"data": str(folder / "two.txt")})
    assert not warnings(a={**one, **parts}, b={**one, **parts})
    assert not warnings(a={**one, **parts}, b={**one, "splits": {"train": "train[:50%]"}, "held_out": 0})
    assert not warnings(a={**one, "held_out": 0}, b={**one, "held_out": 0})


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"validation": "train[:10%]"}, "validation = 'train.:10%.' has rows of train = 'train', .*train.98%:."),
        ({"train": "train[:50%]", "validation": "train[:10%]"}, "validation = 'train.:10%.' has rows of train"),
        ({"train": "train[:-5]", "validation": "train[-6:]"}, "validation = 'train.-6:.' has rows of train"),
        ({"train": "train[:2]+train[4:]", "validation": "train[5:6]"}, "validation = 'train.5:6.' has rows of train"),
        ({"train": "train[x]"}, "the split 'train.x.' cannot be read: "),
        ({"train": "train[:90%]", "validation": "train[90%:]"}, None),
        ({"train": "train[10:]", "validation": "train[:2]", "test": "train[5:7]"}, None),
        ({"train": "train[:-5]", "validation": "train[-5:]"}, None),
        # the length of the split says whether they share rows
        ({"train": "train[5:]", "validation": "train[:10%]"}, None),
    ],
)
def test_rows_of_a_source_are_trained_on_or_held_out(tmp_path, splits, message):
    (tmp_path / "t.txt").write_text("a\n" * 50)
    source = read_sources({"mine": {"data": str(tmp_path / "t.txt"), "text": "text", "splits": splits}})[0]
    if message is None:
        assert source.split_names() == {"train": "train"} | splits
    else:
        with pytest.raises(InputError, match=f"^sources: 'mine': splits: {message}"):
            source.split_names()


def test_datasets_opens_the_shards(processor, many, tmp_path):
    tokenize(many, processor, tmp_path / "tokens", rows_per_shard=128)
    files = sorted(map(str, (tmp_path / "tokens" / "many").glob("train-*.arrow")))
    opened = load_dataset("arrow", data_files=files, split="train")
    assert len(opened) == len(documents(tmp_path / "tokens", "many"))
    assert len(opened[0]["codes"]) == 2 * 16


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"data": "./nowhere", "text": "text"}, "there is no folder './nowhere'"),
        ({"data": "nowhere.txt", "text": "text"}, "there is no file 'nowhere.txt'"),
        ({"data": "t.txt", "text": "words"}, "has no column 'words', but .'text'."),
        ({"data": "t.txt", "text": "text", "splits": {"train": "test"}}, "has no split 'test'"),
        (
            {"data": "t.txt", "text": "text", "splits": {"validation": "train"}},
            "'train'., which have other names here",
        ),
        ({"data": "t.txt", "txt": "text"}, "'txt' is no field of a source of texts. Did you mean 'text'"),
        ({"data": "t.txt"}, "has no 'text'"),
        (
            {"data": "t.txt", "image": "i", "text": "t", "image_first": 2},
            "image_first = 2 must be between 0 and 1: share of the examples",
        ),
        ({"data": "t.txt", "text": "t", "weight": 0}, "weight = 0 must be between 1e-06 and 1e.06: its part of the"),
        ({"data": "t.txt", "text": "t", "held_out": 1}, "held_out = 1 must be at least 0 and below 1: share of the"),
        (
            {"data": "t.txt", "text": "t", "load": {"revision": date(2024, 2, 1)}},
            "load: revision = 2024-02-01 is a date in YAML: put quotes around",
        ),
        ({"data": "t.txt", "segments": "a", "messages": "b"}, "names both of `segments` and `messages`"),
        ({"data": "t.txt", "segments": None}, "names neither of `segments` and `messages`"),
        ({"data": "t.txt", "text": "{"}, "sources: 'mine': template '{' cannot be read"),
        ({"data": "t.txt", "text": "{text!r}"}, "sources: 'mine': template '{text!r}': braces hold names"),
        ({"data": "t.txt", "text": "{{t}}"}, "'mine': template '{{t}}' names no column: .* in single braces, {label}"),
        ({"text": "text"}, "needs `data`"),
    ],
)
def test_what_is_wrong_with_a_source_is_named(tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("a\n")
    with pytest.raises(ValueError, match=message):
        source = read_sources({"mine": fields})[0]
        source.split_names()
        source.open("train")


@pytest.mark.parametrize("content", ["[]", '{"name": "of a web page"}'])
def test_a_manifest_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="manifest.json"):
        read_manifest(tmp_path)
