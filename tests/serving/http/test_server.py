# SPDX-License-Identifier: Apache-2.0
"""`transformers serve`, started as a user starts it and asked by the `openai` client."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

import modeling_moma  # noqa: F401, registers the Auto classes
from benchmarks.serving_requests import address_of, png
from helpers.absent import WITHOUT_PACKAGES
from helpers.openai_client import client_of_server
from helpers.recorders import recorder
from helpers.released import released_repository, skip_without_released_model


ROOT = Path(__file__).resolve().parents[3]
NAME = "model_cards/moma-emoji"
# Transformers' own command
SERVER = """
from transformers.cli.transformers import main

main()
"""


@contextmanager
def served(words, folder, cwd=ROOT):
    """A client of a server of the released model, which `python` with these words starts."""
    skip_without_released_model()
    with client_of_server(words, folder, cwd) as client:
        yield client


@pytest.fixture(scope="module")
def web():
    with recorder() as server:
        yield server


@pytest.fixture(scope="module")
def client(tmp_path_factory, web):
    words = ["-m", "modeling_moma", "serve", NAME, "--image-hosts", f"127.0.0.1:{web.server_port}"]
    with served(words, tmp_path_factory.mktemp("server")) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    return AutoModelForCausalLM.from_pretrained(ROOT / NAME, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor(client):
    return AutoProcessor.from_pretrained(ROOT / NAME)


@pytest.fixture(scope="module")
def drawing():
    """A red disc on white, and its address that holds all of it."""
    rows, columns = np.mgrid[:64, :64]
    pixels = np.full((64, 64, 3), 255, dtype=np.uint8)
    pixels[(rows - 32) ** 2 + (columns - 32) ** 2 < 400] = (220, 30, 30)
    image = Image.fromarray(pixels)
    return image, address_of(png(image))


def greedy(model, processor, inputs, max_new_tokens, **kwargs):
    """New ids and their text."""
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, **kwargs)
    new_ids = ids[0, inputs["input_ids"].shape[1] :]
    return new_ids, processor.tokenizer.decode(new_ids, skip_special_tokens=True)


def ask(client, content, max_tokens, **kwargs):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=max_tokens, **{"temperature": 0, **kwargs}
    )


def test_words_are_streamed_and_equal_greedy_generation(client, model, processor):
    chunks = list(ask(client, "noto: flag", 12, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    chat = [{"role": "user", "content": "noto: flag"}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    new_ids, expected = greedy(model, processor, inputs, 12)
    assert len(pieces) > 1 and "".join(pieces) == expected != ""
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_an_image_in_the_message_is_named_as_generate_names_it(client, model, processor, drawing):
    image, address = drawing
    content = [{"type": "image_url", "image_url": {"url": address}}]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, content, 24, stream=True))
    inputs = processor(images=[image], text=["<image>"], return_tensors="pt")
    new_ids, expected = greedy(model, processor, inputs, 24)
    assert streamed == expected and ": " in expected
    whole = ask(client, content, 24)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "stop"
    assert whole.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert whole.usage.completion_tokens == len(new_ids)


def test_what_is_served_is_text_even_where_the_model_would_draw(client, model, processor):
    inputs = processor(text=["noto: red apple"], return_tensors="pt")
    drawn, _ = greedy(model, processor, inputs, 80, generation_mode="interleaved")
    assert processor.begin_image_token_id in drawn
    _, expected = greedy(model, processor, inputs, 8)
    answer = client.completions.create(model=NAME, prompt="noto: red apple", max_tokens=8, temperature=0)
    assert answer.choices[0].text == expected
    streamed = client.completions.create(
        model=NAME, prompt="noto: red apple", max_tokens=8, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected


def test_responses_equal_generate_whole_and_streamed(client, model, processor, drawing):
    image, address = drawing
    parts = [{"type": "input_image", "image_url": address}]
    for given, inputs in (
        ("noto: flag", processor(text=["noto: flag"], return_tensors="pt")),
        ([{"role": "user", "content": parts}], processor(images=[image], text=["<image>"], return_tensors="pt")),
    ):
        _, expected = greedy(model, processor, inputs, 12)
        settings = {"model": NAME, "max_output_tokens": 12, "temperature": 0}
        # whole where nothing is said, as OpenAI's own
        for stream in ({}, {"stream": False}):
            assert client.responses.create(input=given, **stream, **settings).output_text == expected
        events = client.responses.create(input=given, stream=True, **settings)
        streamed = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(streamed) == expected != ""


def test_the_server_lists_the_model_and_survives_a_bad_request(client):
    assert [model.id for model in client.models.list()] == [NAME]
    import openai

    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}], 4)
    assert refusal.value.param == "messages[0].content[0].image_url.url"
    assert ask(client, "noto: flag", 4).choices[0].message.content


def test_an_answer_ends_before_a_stop_string(client, model, processor):
    _, expected = greedy(model, processor, processor(text=["noto: red apple"], return_tensors="pt"), 12)
    stop = expected.split()[1]
    for stream in (False, True):
        settings = {"max_tokens": 12, "temperature": 0, "stop": [stop], "stream": stream}
        answer = client.completions.create(model=NAME, prompt="noto: red apple", **settings)
        text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
        assert text == expected[: expected.index(stop)]


def test_an_image_of_a_named_host_is_fetched_once(client, model, processor, drawing, web):
    image, _ = drawing
    web.image, host = png(image), f"127.0.0.1:{web.server_port}"
    address = f"http://{host}/disc.png"
    answer = ask(client, [{"type": "image_url", "image_url": {"url": address}}], 24)
    _, expected = greedy(model, processor, processor(images=[image], text=["<image>"], return_tensors="pt"), 24)
    assert answer.choices[0].message.content == expected
    assert web.asked == [(host, "/disc.png")]


def test_the_model_is_served_by_its_own_code_where_the_package_is_absent(model, processor, tmp_path):
    folder = str(released_repository(tmp_path / "moma-emoji"))
    words = ["-c", WITHOUT_PACKAGES + SERVER, "serve", folder, "--trust-remote-code"]
    with served(words, tmp_path, cwd=tmp_path) as client:
        answer = client.completions.create(model=folder, prompt="noto: red apple", max_tokens=8, temperature=0)
    _, expected = greedy(model, processor, processor(text=["noto: red apple"], return_tensors="pt"), 8)
    assert answer.choices[0].text == expected
