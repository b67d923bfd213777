# SPDX-License-Identifier: Apache-2.0
"""The page of a model that hears: sounds in and out through the page's own server, and what is no sound."""

import base64
import io
import wave

import numpy as np
import pytest

from helpers.sounds import RATE, THREE, as_file, processor_of_sounds, tone
from helpers.tiny import tiny_model, tiny_processor


gr = pytest.importorskip("gradio", reason="`pip install 'modeling-moma[demo]'` is missing")

from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from modeling_moma.demo.inputs import read_sound_upload  # noqa: E402
from modeling_moma.demo.page import build_page, open_page  # noqa: E402
from modeling_moma.demo.studio import DemoSession  # noqa: E402
from modeling_moma.demo.tabs import as_html, as_sound  # noqa: E402


@pytest.fixture(scope="module")
def studio():
    processor = processor_of_sounds()
    return DemoSession(tiny_model(processor, **THREE), processor, "tiny")


@pytest.fixture(scope="module")
def client(studio, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        page = build_page(studio)
        address = open_page(page, port=0)
        yield Client(address, verbose=False, download_files=str(folder / "answers"))
        page.close()


@pytest.fixture
def sound_file(tmp_path):
    (tmp_path / "tone.wav").write_bytes(as_file(tone(500)))
    return str(tmp_path / "tone.wav")


def test_a_visitor_has_a_sound_written_and_hears_what_the_model_heard(client, studio, sound_file):
    written, heard = client.predict(handle_file(sound_file), api_name="/listen")
    samples = read_sound_upload(sound_file, RATE, folder="/")
    assert written == studio.listen(samples)
    with wave.open(heard) as file:
        found = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        assert file.getframerate() == RATE
    assert np.array_equal(found, as_sound(studio.heard(samples), RATE)[1])


def test_a_visitor_has_a_sound_drawn_and_words_spoken(client, studio, sound_file):
    drawn = client.predict(handle_file(sound_file), 0, 1, 0, api_name="/draw_sound")
    assert drawn["path"] if isinstance(drawn, dict) else drawn
    said = client.predict("red apple", 0.7, 1, 3, api_name="/say")
    with wave.open(said) as file:
        found = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert np.array_equal(found, as_sound(studio.say("red apple", 0.7, 1.0, 3), RATE)[1])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"these are words", "not a sound that can be read"),
        (b"", "not a sound that can be read"),
        (as_file(tone(500))[:44], "not a sound that can be read"),
        (as_file(np.zeros(31 * RATE, np.int16), kind="FLAC"), "longer than 30 s"),
        (as_file(np.zeros(700 * RATE, np.int16), kind="FLAC"), "too long"),
    ],
)
def test_uploads_that_are_no_usable_sound_are_refused_without_naming_files(content, message, tmp_path, client):
    path = tmp_path / "upload.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_sound_upload(str(path), RATE, str(tmp_path))
    assert str(tmp_path) not in str(refusal.value)
    with pytest.raises(AppError, match=message):
        client.predict(handle_file(str(path)), api_name="/listen")


def test_files_that_nobody_uploaded_are_refused(sound_file, tmp_path):
    (tmp_path / "uploads").mkdir()
    for path in (sound_file, f"{tmp_path}/uploads/../tone.wav", "/etc/hostname"):
        with pytest.raises(ValueError, match="was not uploaded"):
            read_sound_upload(path, RATE, str(tmp_path / "uploads"))


def test_sounds_of_an_answer_are_played(studio):
    frame = studio.processor.frame_ids("audio", [1, 2, 3])
    words = studio.processor.tokenizer("red apple", add_special_tokens=False)["input_ids"]
    parts = studio.partial.parts([*words, *frame, *frame[:2]])
    assert parts[0] == "red apple" and len(parts) == 2 and len(parts[1]) == 3 * 80
    shown = as_html(parts, RATE)
    assert shown.count("<audio controls") == 1
    content = shown.split("base64,")[1].split('"')[0]
    with wave.open(io.BytesIO(base64.b64decode(content))) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, 240)


def test_only_models_that_hear_have_the_tab(studio):
    def tabs(page):
        return [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]

    assert tabs(build_page(studio)) == ["Caption", "Names", "Draw", "Sounds", "Interleaved", "Routing"]
    processor = tiny_processor()
    page = build_page(DemoSession(tiny_model(processor), processor, "tiny"))
    assert tabs(page) == ["Caption", "Names", "Draw", "Interleaved", "Routing"]
