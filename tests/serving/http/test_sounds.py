# SPDX-License-Identifier: Apache-2.0
"""`moma serve` with a model that hears: sounds in messages, and what is no sound."""

import base64
from pathlib import Path

import numpy as np
import pytest

from helpers.openai_client import client_of_server
from helpers.sounds import RATE, THREE, as_file, processor_of_sounds, tone
from helpers.tiny import noise_images, tiny_model


ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def processor():
    return processor_of_sounds()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_model(processor, **THREE, seed=3)


@pytest.fixture(scope="module")
def client(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    with client_of_server(["-m", "modeling_moma", "serve", str(folder / "model")], folder, ROOT) as client:
        client.model = str(folder / "model")
        yield client


def part(content: bytes, **fields) -> dict:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), **fields}}


def ask(client, parts, **kwargs):
    messages = [{"role": "user", "content": parts}]
    return client.chat.completions.create(model=client.model, messages=messages, max_tokens=8, temperature=0, **kwargs)


def expected(model, processor, sound, image=None):
    parts = [{"type": "text", "text": "hear"}, {"type": "audio", "audio": sound}]
    parts += [] if image is None else [{"type": "image", "image": image}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_to_sounds_are_those_of_generate(client, model, processor, tmp_path):
    text = {"type": "text", "text": "hear"}
    sounds = {name: as_file(tone(500, rate=11025), 11025, kind=name) for name in ("WAV", "FLAC")}
    paths = [tmp_path / "sound.file" for _ in sounds]
    for path, (name, content) in zip(paths, sounds.items()):
        path.write_bytes(content)
        said = expected(model, processor, str(path))
        assert ask(client, [text, part(content, format=name.lower())]).choices[0].message.content == said
        chunks = ask(client, [text, part(content)], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said


def test_sounds_and_images_stand_side_by_side(client, model, processor, tmp_path):
    noise_images(1)[0].save(tmp_path / "image.png")
    (tmp_path / "sound.wav").write_bytes(as_file(tone(700)))
    said = expected(model, processor, str(tmp_path / "sound.wav"), noise_images(1)[0])
    address = "data:image/png;base64," + base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    parts = [{"type": "text", "text": "hear"}, part((tmp_path / "sound.wav").read_bytes())]
    parts.append({"type": "image_url", "image_url": {"url": address}})
    assert ask(client, parts).choices[0].message.content == said


@pytest.mark.parametrize(
    "hostile, status, message",
    [
        (part(b"no sound at all"), 400, "sound damaged"),
        (part(as_file(tone(500))[:40]), 400, "sound"),
        (part(as_file(tone(500)), format="exe"), 400, "should be 'wav', 'mp3', 'flac' or 'ogg'"),
        ({"type": "input_audio", "input_audio": {"data": "%%%"}}, 400, "it is no base64"),
        ({"type": "input_audio", "input_audio": {"data": "http://127.0.0.1/a.wav"}}, 400, "it is no base64"),
        ({"type": "input_audio", "input_audio": {"data": "/etc/hostname"}}, 400, "sound damaged|no base64"),
        ({"type": "input_audio", "input_audio": "/etc/hostname"}, 400, "input_audio"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "url": "/etc/hostname"}}, 422, "no such field"),
        (
            {"type": "audio_url", "audio_url": {"url": "file:///etc/hostname"}},
            400,
            "does not match any of the expected tags",
        ),
        (part(as_file(np.zeros(601 * 8000, np.int16), kind="FLAC")), 413, "sound too long"),
        (part(as_file(np.zeros((60_000, 8), np.int16), 655350 // 5, kind="FLAC")), None, None),
        (part(as_file(np.zeros((600_000, 8), np.int16), 131070, kind="FLAC")), 413, "sound too large"),
    ],
)
def test_what_is_no_sound_is_refused_and_the_server_goes_on(client, hostile, status, message):
    import openai

    if status is not None:
        with pytest.raises(openai.APIStatusError, match=message) as refusal:
            ask(client, [hostile])
        assert refusal.value.status_code == status
    assert ask(client, [part(as_file(tone(500)))]).choices[0].message is not None


def test_long_sounds_are_not_taken_for_long_texts(client):
    noise = as_file(np.random.default_rng(0).uniform(-1, 1, RATE // 2))
    sound = part(noise, format="wav")
    assert ask(client, [sound]).choices[0].message is not None
    import openai

    with pytest.raises(openai.APIStatusError, match="letters are more than"):
        ask(client, [{"type": "text", "text": sound["input_audio"]["data"]}])


def test_too_many_sounds_are_refused(client):
    import openai

    with pytest.raises(openai.APIStatusError, match="more than 16 sounds"):
        ask(client, [part(as_file(tone(500)))] * 17)
