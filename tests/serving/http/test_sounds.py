# SPDX-License-Identifier: Apache-2.0
"""The app of `moma serve` with a model that hears: sounds in messages, and what is no sound."""

import base64

import numpy as np
import pytest

from helpers.chat_requests import address_of, image_part, png
from helpers.sounds import RATE, THREE, as_file, processor_of_sounds, tone
from helpers.tiny import noise_images, tiny_model


openai = pytest.importorskip("openai")
for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package, reason="the extra `serve` is missing")

from fastapi.testclient import TestClient  # noqa: E402

from modeling_moma.serving.http.generation import Engine  # noqa: E402
from modeling_moma.serving.http.server import build_app  # noqa: E402


@pytest.fixture(scope="module")
def processor():
    return processor_of_sounds()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_model(processor, **THREE, seed=3)


@pytest.fixture(scope="module")
def client(model, processor):
    """The `openai` client of the server's app in this process."""
    app, address = build_app(Engine(model.eval(), processor, "a/model")), "http://127.0.0.1"
    with TestClient(app, base_url=address, raise_server_exceptions=False) as http:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, http_client=http)


def part(content: bytes, **fields) -> dict:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), **fields}}


def ask(client, parts, **kwargs):
    messages = [{"role": "user", "content": parts}]
    return client.chat.completions.create(model="a/model", messages=messages, max_tokens=8, temperature=0, **kwargs)


def test_answers_to_sounds_are_those_of_generate(client, model, processor, tmp_path):
    content, image = as_file(tone(500, rate=11025), 11025, kind="FLAC"), noise_images(1)[0]
    path, text = tmp_path / "sound.file", {"type": "text", "text": "hear"}
    path.write_bytes(content)
    shown = [text, {"type": "audio", "audio": str(path)}, {"type": "image", "image": image}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": shown}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    parts = [text, part(content, format="flac"), image_part(address_of(png(image)))]
    assert ask(client, parts).choices[0].message.content == said
    chunks = ask(client, parts, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said


@pytest.mark.parametrize(
    "hostile, status, message",
    [
        (part(b"no sound at all"), 400, "sound damaged"),
        ({"type": "input_audio", "input_audio": {"data": "http://127.0.0.1/a.wav"}}, 400, "it is no base64"),
        ({"type": "input_audio", "input_audio": {"data": "/etc/hostname"}}, 400, "sound damaged|no base64"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "url": "/etc/hostname"}}, 422, "no such field"),
        (part(as_file(np.zeros(601 * 8000, np.int16), kind="FLAC")), 413, "sound too long"),
        (part(as_file(np.zeros((60_000, 8), np.int16), 655350 // 5, kind="FLAC")), None, None),
        (part(as_file(np.zeros((600_000, 8), np.int16), 131070, kind="FLAC")), 413, "sound too large"),
    ],
)
def test_what_is_no_sound_is_refused_and_the_server_goes_on(client, hostile, status, message):
    if status is not None:
        with pytest.raises(openai.APIStatusError, match=message) as refusal:
            ask(client, [hostile])
        assert refusal.value.status_code == status
    assert ask(client, [part(as_file(tone(500)))]).choices[0].message is not None


def test_long_sounds_are_not_taken_for_long_texts(client):
    noise = as_file(np.random.default_rng(0).uniform(-1, 1, RATE // 2))
    sound = part(noise, format="wav")
    assert ask(client, [sound]).choices[0].message is not None
    with pytest.raises(openai.APIStatusError, match="letters are more than"):
        ask(client, [{"type": "text", "text": sound["input_audio"]["data"]}])
    with pytest.raises(openai.APIStatusError, match="more than 16 sounds"):
        ask(client, [sound] * 17)
