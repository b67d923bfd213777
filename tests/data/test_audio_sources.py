# SPDX-License-Identifier: Apache-2.0
"""Sources with sounds: sounds with texts, documents and chats in which sounds stand among texts and images."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Features, Value
from datasets.exceptions import DatasetGenerationError

from helpers.sounds import MELS, RATE, as_file, processor_of_sounds, tone
from helpers.tiny import noise_images, tiny_processor
from modeling_moma.data.documents import TokenFolder
from modeling_moma.data.encoding import processor_fingerprint
from modeling_moma.data.jobs import plan_job, write_job, write_manifest
from modeling_moma.data.sources import read_sources, source_texts
from modeling_moma.data.stream import DocumentExamples
from modeling_moma.data.tokenizing import run_tasks
from modeling_moma.errors_moma import InputError
from modeling_moma.training.audio_tokenizer import train_audio_tokenizer
from modeling_moma.training.pretraining import training_stream
from modeling_moma.training.recipe import DataFields
from modeling_moma.training.tokenizer_settings import AudioTokenizerSettings
from tokenization import MelCodec, MomaProcessor
from tokenization.audio_input_moma import SoundError


WORDS = ["red", "apple", "castle", "green"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    processor_of_sounds().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def processor():
    return processor_of_sounds()


def sounds() -> list[np.ndarray]:
    return [tone(300 * place, 0.04 + 0.01 * place) for place in range(1, 5)]


def write_sounds(path, contents, words=WORDS):
    """A parquet file as `datasets` writes one with an `Audio` column, for which it would need torchcodec."""
    features = Features({"audio": Audio(), "word": Value("string")})
    rows = [{"audio": content, "word": word} for content, word in zip(contents, words)]
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), path)


def tokenize(sources, processor, folder, length=64, **kwargs):
    job = plan_job(read_sources(sources), processor, length, True, 0)
    write_job(folder, job)
    run_tasks(folder, job, 1, **kwargs)
    return write_manifest(folder, job)


def test_sounds_with_texts_go_from_the_recipe_to_the_stream(folder, processor, tmp_path):
    write_sounds(tmp_path / "words.parquet", [{"bytes": as_file(sound), "path": None} for sound in sounds()])
    source = {"data": str(tmp_path / "words.parquet"), "audio": "audio", "text": "a {word}", "held_out": 0}
    sources = read_sources({"words": source})
    assert list(source_texts(sources, 10)) == [f"a {word}" for word in WORDS]
    manifest = tokenize({"words": source}, folder, tmp_path / "tokens")
    codes = processor.encode_items("audio", [as_file(sound) for sound in sounds()])
    tokens = manifest["sources"]["words"]["splits"]["train"]["tokens"]
    assert tokens["audio"] == sum(map(len, codes)) and tokens["image"] == 0
    documents = TokenFolder(tmp_path / "tokens", processor).documents(sources[0])
    text = [processor.tokenizer(f"a {word}", add_special_tokens=False)["input_ids"] for word in WORDS]
    bos, eos = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    heard = [[bos, *processor.frame_ids("audio", part), *ids, eos] for part, ids in zip(codes, text)]
    said = [[bos, *ids, *processor.frame_ids("audio", part), eos] for part, ids in zip(codes, text)]
    assert list(documents.held_out()) == heard + said
    assert len(documents.held_out([2])) == 2 and documents.held_out([2])[1] == said[2]
    # what is counted is all of one reading
    assert tokens["text"] + tokens["audio"] == sum(map(len, heard))
    drawn = [documents.ids(1, np.random.default_rng(seed)) for seed in range(200)]
    assert 70 < sum(ids == heard[1] for ids in drawn) < 130 and all(ids in (heard[1], said[1]) for ids in drawn)
    (first,) = read_sources({"words": {**source, "audio_first": 1.0}})
    always = TokenFolder(tmp_path / "tokens", processor).documents(first)
    assert all(always.ids(1, np.random.default_rng(seed)) == heard[1] for seed in range(9))
    stream = DocumentExamples([documents], [1.0], 8, 0)
    for example in (stream[place] for place in range(8)):
        assert example["input_ids"] in heard + said
    assert DocumentExamples([documents], [1.0], 8, 0)[3] == stream[3]


def test_other_texts_than_the_tokenized_ones_have_to_fit(folder, processor, tmp_path, caplog):
    write_sounds(tmp_path / "words.parquet", [{"bytes": as_file(sound), "path": None} for sound in sounds()])
    source = {"data": str(tmp_path / "words.parquet"), "audio": "audio", "text": "{word}", "held_out": 0}
    tokenize({"words": source}, folder, tmp_path / "tokens")
    tokens = TokenFolder(tmp_path / "tokens", processor)

    def stream(text, length=64):
        sources = read_sources({"words": {**source, "text": text}})
        return training_stream(DataFields(length), tokens, sources, 4, seed=0)

    with pytest.raises(ValueError, match="'words', row 0: a text of the recipe has .* with its sound, over 64"):
        stream("{word} " + "of many more words than there were " * 3)
    assert len(stream("{word} " + "of many more words than there were " * 3, length=160)) == 4
    stream("{word} again")
    assert not caplog.records


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_of_sounds_is_read_without_torchcodec(folder, tmp_path, name, streaming):
    sound_folder = tmp_path / "sounds"
    sound_folder.mkdir()
    for index, sound in enumerate(sounds()):
        (sound_folder / f"{index}.flac").write_bytes(as_file(sound, kind="FLAC"))
    rows = [{"file_name": f"{index}.flac", "word": word} for index, word in enumerate(WORDS)]
    lines = ["file_name,word", *(",".join(row.values()) for row in rows)]
    (sound_folder / name).write_text("\n".join(lines if name.endswith("csv") else map(json.dumps, rows)))
    load = {"load": {"streaming": True}} if streaming else {}
    source = {"data": str(sound_folder), "audio": "audio", "text": "word", "held_out": 0, **load}
    read = tokenize({"words": source}, folder, tmp_path / "tokens")["sources"]["words"]
    assert read["splits"]["train"]["documents"] == 4 and not read["read"]["train"]["left_out"]


def test_what_stands_in_the_way_of_a_folder_is_said(tmp_path, monkeypatch):
    def broken(path, **options):
        raise DatasetGenerationError("An error occurred while generating the dataset") from ImportError("no\nnoise")

    (tmp_path / "words.jsonl").write_text("{}\n")
    monkeypatch.setattr("modeling_moma.data.sources.load_dataset", broken)
    source = {"data": str(tmp_path / "words.jsonl"), "audio": "audio", "text": "word"}
    with pytest.raises(ValueError, match=r"cannot open '.*words.jsonl' \(ImportError: no noise\)"):
        read_sources({"words": source})[0].open("train")


def test_rows_that_cannot_be_used_are_left_out_by_name(folder, tmp_path):
    contents = [
        {"bytes": as_file(tone(400)), "path": None},
        {"bytes": b"no sound", "path": None},
        {"bytes": None, "path": None},
        {"bytes": as_file(tone(400)), "path": None},
        {"bytes": as_file(tone(400, 2.0)), "path": None},
        {"bytes": None, "path": "nowhere.wav"},
        # integers written as floats
        {"bytes": as_file(tone(400) * 32767, subtype="FLOAT"), "path": None},
        {"bytes": None, "path": "UklGR" + "A" * 5000},
    ]
    write_sounds(tmp_path / "words.parquet", contents, ["a", "b", "c", "", "e", "f", "g", "h"])
    source = {"data": str(tmp_path / "words.parquet"), "audio": "audio", "text": "word", "held_out": 0}
    read = tokenize({"words": source}, folder, tmp_path / "tokens")["sources"]["words"]["read"]["train"]
    reasons = {"sound damaged": 1, "sound missing": 3, "text empty": 1, "sound too long": 1, "sound not readable": 1}
    assert read["left_out"] == reasons
    assert [row["row"] for row in read["named"]] == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match=r"'words', split 'train', row 1: sound damaged: 8 bytes cannot be decoded"):
        tokenize({"words": source}, folder, tmp_path / "strict", strict=True)


def test_a_codec_is_learnt_without_the_sounds_that_cannot_be_used(tmp_path):
    contents = [as_file(tone(400, 0.2)), as_file(tone(400) * 32767, subtype="FLOAT")]
    write_sounds(tmp_path / "words.parquet", [{"bytes": content, "path": None} for content in contents])
    sources = read_sources({"words": {"data": str(tmp_path / "words.parquet"), "audio": "audio", "text": "word"}})
    facts = train_audio_tokenizer(sources, AudioTokenizerSettings(num_codes=4, **MELS)).facts
    assert facts["sounds"] + facts["held_out_sounds"] == 1 and facts["left_out"] == {"sound not readable": 1}


def test_what_a_codec_refuses_is_left_out(folder, tmp_path, monkeypatch):
    def refuse(codec, item):
        raise SoundError("sound odd", "this codec does not like it")

    monkeypatch.setattr(MelCodec, "log_mels", refuse)
    write_sounds(tmp_path / "words.parquet", [{"bytes": as_file(tone(400)), "path": None}])
    source = {"data": str(tmp_path / "words.parquet"), "audio": "audio", "text": "word", "held_out": 0}
    with pytest.raises(InputError, match="of 1 rows 1 sound odd; the first: 'this codec"):
        tokenize({"words": source}, folder, tmp_path / "tokens")
    with pytest.raises(InputError, match=r"have only 0 places .*\(1 sound odd\)"):
        train_audio_tokenizer(read_sources({"words": source}), AudioTokenizerSettings(num_codes=4, **MELS))


def test_a_processor_without_a_codec_is_refused_at_once(tmp_path):
    tiny_processor().save_pretrained(tmp_path / "images")
    write_sounds(tmp_path / "words.parquet", [{"bytes": as_file(sound), "path": None} for sound in sounds()])
    source = {"data": str(tmp_path / "words.parquet"), "audio": "audio", "text": "word"}
    with pytest.raises(ValueError, match="'words' has sounds, .* has no codec of them; .*--audio-tokenizer"):
        tokenize({"words": source}, str(tmp_path / "images"), tmp_path / "tokens")


def write_documents(path):
    noise_images(1)[0].save(path / "image.png")
    (path / "sound.wav").write_bytes(as_file(tone(500)))
    segments = [
        [{"audio": "sound.wav"}, {"image": "image.png"}],
        ["this is ", {"type": "audio", "audio": "sound.wav"}, " and ", {"image": "image.png"}],
        [{"text": "gone: "}, {"audio": "nowhere.wav"}],
    ]
    (path / "documents.jsonl").write_text("\n".join(json.dumps({"segments": row}) for row in segments))
    return {"data": str(path / "documents.jsonl"), "segments": "segments", "held_out": 0}


def test_sounds_stand_among_texts_and_images(folder, processor, tmp_path):
    source = write_documents(tmp_path)
    manifest = tokenize({"mixed": source}, folder, tmp_path / "tokens")["sources"]["mixed"]
    documents = TokenFolder(tmp_path / "tokens", processor).documents(read_sources({"mixed": source})[0])
    rows = [documents.ids(row, np.random.default_rng(0)).tolist() for row in range(3)]
    (codes,) = processor.encode_items("audio", [tmp_path / "sound.wav"])
    (image,) = processor.encode_images([str(tmp_path / "image.png")])
    assert rows[0][1:-1] == [*processor.frame_ids("audio", codes), *processor.image_ids(image)]
    assert [type(part).__name__ for part in processor.decode_parts(rows[1])] == ["str", "ndarray", "str", "Image"]
    assert processor.decode_parts(rows[2]) == ["gone: "]
    tokens = manifest["splits"]["train"]["tokens"]
    assert tokens["audio"] == 2 * len(codes) and tokens["image"] == 2 * 16
    assert manifest["read"]["train"]["images_left_out"] == {"sound missing": 1}
    images = tiny_processor()
    images.save_pretrained(tmp_path / "images")
    read = tokenize({"mixed": source}, str(tmp_path / "images"), tmp_path / "without")["sources"]["mixed"]["read"]
    assert read["train"]["images_left_out"]["sound not readable"] == 3


def test_chats_have_sounds(folder, processor, tmp_path):
    (tmp_path / "sound.wav").write_bytes(as_file(tone(500)))
    noise_images(1)[0].save(tmp_path / "image.png")
    part, answer = {"type": "audio", "audio": "sound.wav"}, {"role": "assistant", "content": "red"}
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "say "}, part]}, answer]},
        {
            "messages": [{"role": "user", "content": "<image> and <audio>"}, answer],
            "images": ["image.png"],
            "audios": ["sound.wav"],
        },
        {"messages": [{"role": "user", "content": "<audio>"}, answer], "audios": []},
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    (tmp_path / "parts.jsonl").write_text(json.dumps(rows[0]))
    sources = {
        "chats": {"data": str(tmp_path / "chats.jsonl"), "messages": "messages", "images": "images"},
        "parts": {"data": str(tmp_path / "parts.jsonl"), "messages": "messages"},
    }
    sources["chats"]["audios"] = "audios"
    sources = {name: {**fields, "held_out": 0} for name, fields in sources.items()}
    manifest = tokenize(sources, folder, tmp_path / "tokens")
    assert manifest["sources"]["chats"]["read"]["train"]["left_out"] == {"sounds missing in chat": 1}
    tokens = TokenFolder(tmp_path / "tokens", processor)
    for source, sound_parts in zip(read_sources(sources), ([{"type": "image"}], [])):
        ids = tokens.documents(source).ids(0, np.random.default_rng(0)).tolist()
        kinds = [type(part).__name__ for part in processor.decode_parts(ids)]
        assert kinds.count("ndarray") == 1 and kinds.count("Image") == len(sound_parts)
    chat = [
        {"role": "user", "content": [rows[0]["messages"][0]["content"][0], {"type": "audio", "audio": "x"}]},
        answer,
    ]
    chat[0]["content"][1] = {"type": "audio", "audio": str(tmp_path / "sound.wav")}
    expected = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]
    assert ids == expected
    tiny_processor().save_pretrained(tmp_path / "images")
    del sources["chats"]
    with pytest.raises(ValueError, match="the processor knows text, image, and a part is of type 'audio'"):
        tokenize(sources, str(tmp_path / "images"), tmp_path / "without")


def test_codecs_are_part_of_the_fingerprint(folder, processor):
    other = processor_of_sounds()
    assert processor_fingerprint(MomaProcessor.from_pretrained(folder)) == processor_fingerprint(processor)
    other.codecs["audio"].codebook[0] += 1
    assert processor_fingerprint(other) != processor_fingerprint(processor) != processor_fingerprint(tiny_processor())
    assert processor.codecs["audio"].sampling_rate == RATE
