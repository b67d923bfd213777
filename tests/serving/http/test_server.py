# SPDX-License-Identifier: Apache-2.0
"""`moma serve`, started as a user starts it and asked by the `openai` client."""

import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, set_seed

import modeling_moma  # noqa: F401, registers the Auto classes
from helpers.chat_requests import address_of, disc, image_part, message, png
from helpers.openai_client import client_of_server
from helpers.released import skip_without_released_model


openai = pytest.importorskip("openai")
ROOT = Path(__file__).resolve().parents[3]
NAME = "model_cards/moma-emoji"
# seconds that an honest client may wait beside six whose texts fit no model
PATIENCE = 2.0


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    skip_without_released_model()
    with client_of_server(["-m", "modeling_moma", "serve", NAME], tmp_path_factory.mktemp("server"), ROOT) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    return AutoModelForCausalLM.from_pretrained(ROOT / NAME, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor(client):
    return AutoProcessor.from_pretrained(ROOT / NAME)


def greedy(model, processor, inputs, max_new_tokens, **kwargs):
    """New ids and their text."""
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, **kwargs)
    new_ids = ids[0, inputs["input_ids"].shape[1] :]
    return new_ids, processor.tokenizer.decode(new_ids, skip_special_tokens=True)


def ask(client, content, max_tokens, **kwargs):
    settings = {"max_tokens": max_tokens, "temperature": 0, **kwargs}
    return client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": content}], **settings)


def test_words_are_streamed_and_equal_greedy_generation(client, model, processor):
    *chunks, last = ask(client, "noto: flag", 12, stream=True, stream_options={"include_usage": True})
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    inputs = processor.apply_chat_template(
        message("noto: flag"), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    new_ids, expected = greedy(model, processor, inputs, 12)
    assert len(pieces) > 1 and "".join(pieces) == expected != ""
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert last.choices == [] and {chunk.usage for chunk in chunks} == {None}
    assert last.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert last.usage.completion_tokens == len(new_ids)
    # who does not ask for usage gets none
    assert all(chunk.usage is None and chunk.choices for chunk in ask(client, "noto: flag", 2, stream=True))


def test_an_image_in_the_message_is_named_as_generate_names_it(client, model, processor):
    image = disc("red")
    content = [image_part(address_of(png(image)))]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, content, 24, stream=True))
    inputs = processor(images=[image], text=["<image>"], return_tensors="pt")
    new_ids, expected = greedy(model, processor, inputs, 24)
    assert streamed == expected and ": " in expected
    whole = ask(client, content, 24)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "stop"
    assert whole.usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert whole.usage.completion_tokens == len(new_ids)


def test_drawings_equal_those_of_generate(client, model, processor):
    prompt = "noto: red apple"
    settings = {"model": NAME, "prompt": prompt, "n": 2, "response_format": "b64_json"}
    found = client.images.generate(**settings, extra_body={"seed": 0})
    images = [Image.open(io.BytesIO(base64.b64decode(drawing.b64_json))) for drawing in found.data]
    set_seed(0)
    ids = model.generate(**processor(text=[prompt] * 2, return_tensors="pt"), generation_mode="image")
    expected = processor.decode_images(model.decode_image_tokens(ids))
    assert [image.format for image in images] == ["PNG"] * 2
    for image, drawn in zip(images, expected, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(drawn))
    assert not np.array_equal(np.asarray(images[0]), np.asarray(images[1]))
    set_seed(3)
    ids = model.generate(**processor(text=[prompt], return_tensors="pt"), generation_mode="image")
    _, drawn = processor.decode_parts(ids[0])
    one = client.images.generate(model=NAME, prompt=prompt, size="64x64", extra_body={"seed": 3}).data[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(one.b64_json)))), np.asarray(drawn))


def test_the_model_is_listed_and_found_by_its_name(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    for name in ("model_cards/moma", "gpt-4o"):
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            client.models.retrieve(name)


def test_the_server_survives_bad_requests(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.images.generate(model=NAME, prompt="a", response_format="url")
    assert refusal.value.param == "response_format"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=NAME, prompt="a")
    assert ask(client, "noto: flag", 4).choices[0].message.content


def test_texts_that_fit_no_model_hold_up_nobody(client):
    text, is_over = "<" * 200_000, False
    impatient = client.with_options(max_retries=0)

    def repeat() -> int:
        count = 0
        while not is_over:
            with pytest.raises(openai.APIStatusError, match="letters are more than"):
                ask(impatient, text, 4)
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        hostile = [pool.submit(repeat) for _ in range(6)]
        waits = []
        try:
            for _ in range(10):
                began = time.monotonic()
                assert ask(impatient, "noto: flag", 4).choices[0].message.content
                waits.append(time.monotonic() - began)
        finally:
            is_over = True
        counts = [clients.result() for clients in hostile]
    print(f"honest answers took {min(waits):.2f} to {max(waits):.2f} s beside {sum(counts)} refusals")
    assert max(waits) < PATIENCE and min(counts) > 0
