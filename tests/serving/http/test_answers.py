# SPDX-License-Identifier: Apache-2.0
"""Answers of the server of `moma serve`, asked in this process."""

import json

import pytest

from helpers.tiny import tiny_model, tiny_processor


for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package, reason="`pip install transformers[serving]` is missing")

from fastapi.testclient import TestClient  # noqa: E402

from modeling_moma.serving.http.downloads import ImageHosts  # noqa: E402
from modeling_moma.serving.http.generation import StoppedText  # noqa: E402
from modeling_moma.serving.http.limits import Limits  # noqa: E402
from modeling_moma.serving.http.server import CheckedServe  # noqa: E402


CHAT = "/v1/chat/completions"
HEADERS = {"content-type": "application/json"}


OPTIONS = {"host": "127.0.0.1", "port": 8000, "device": "cpu", "dtype": "float32"}


def client_of(server):
    return TestClient(server.server.config.app, base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_model(processor, seed=3)


@pytest.fixture(scope="module")
def server(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return CheckedServe(Limits(pinned=str(folder)), ImageHosts(), force_model=str(folder), **OPTIONS)


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("NaN", "must be a JSON object"),
        ("[NaN]", "must be a JSON object"),
        (r'"\ud800"', "must be a JSON object"),
        ('{"messages": ', "it is no JSON: Expecting value, at character 13"),
        (b"\xff\xfe", "body"),
        ("", "there is none"),
        (json.dumps(["a secret of the client"] * 100), "must be a JSON object"),
    ],
)
def test_body_that_is_no_object_is_refused_in_the_form_of_openai(client, body, reason):
    answer = client.post(CHAT, content=body, headers=HEADERS)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], set(answer.json())) == ("invalid_request_error", "body", {"error"})
    assert reason in error["message"] and len(answer.text) < 300 and "secret" not in answer.text


def ask(client, processor, stream=False, **fields):
    """Text, reason of the end and number of tokens of an answer without `<eos>`."""
    bias = {str(processor.tokenizer.eos_token_id): -100}
    messages = [{"role": "user", "content": "noto: flag"}]
    body = {"messages": messages, "temperature": 0, "logit_bias": bias, "stream": stream, **fields}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    if not stream:
        choice, usage = answer.json()["choices"][0], answer.json()["usage"]
        return choice["message"]["content"], choice["finish_reason"], usage
    chunks = [
        json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")
    ]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    return text, chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["usage"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_answer_that_is_cut_says_so(client, model, processor, stream):
    _, reason, usage = ask(client, processor, stream)
    assert (reason, usage["total_tokens"]) == ("length", model.config.max_position_embeddings)
    in_time = json.dumps({"max_time": 1e-6, "max_new_tokens": 50})
    _, reason, usage = ask(client, processor, stream, generation_config=in_time)
    assert reason == "length" and 0 < usage["completion_tokens"] < 50


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_answer_ends_before_its_stop_string(client, processor, stream):
    expected, _, _ = ask(client, processor, max_tokens=40)
    # from the middle of a token on, perhaps
    stop = expected[9:13]
    text, reason, usage = ask(client, processor, stream, max_tokens=40, stop=[stop, "never said"])
    assert text == expected[: expected.index(stop)] and reason == "stop" and usage["completion_tokens"] < 40


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_whole_numbers_sample_as_fractions_do(client, processor, stream):
    settings = {"do_sample": True, "temperature": 2, "repetition_penalty": 1, "top_p": 1, "max_new_tokens": 8}
    fractions = {**settings, "temperature": 2.0, "repetition_penalty": 1.0, "top_p": 1.0}
    texts = []
    for given in (settings, fractions):
        # a temperature of 0 at the top would turn sampling off
        asked = {"temperature": None, "seed": 7, "generation_config": json.dumps(given)}
        texts.append(ask(client, processor, stream, **asked)[0])
    assert texts[0] == texts[1] != ""


def test_what_may_begin_a_stop_string_is_held_back():
    pieces = ["a<", "/", "b</", "s", ">c", "d"]
    text = StoppedText(["</s>", "never"])
    assert [text.add(piece) for piece in pieces] == ["a", "", "</b", "", "", ""]
    assert text.end() == ""
    text = StoppedText(["</s>"])
    assert [text.add("a"), text.add("</s"), text.end()] == ["a", "", "</s"]


def test_refusals_of_the_handlers_of_transformers_have_that_form_too():
    with client_of(CheckedServe(Limits(), ImageHosts(), **OPTIONS)) as client:
        answer = client.post("/load_model", json={})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "body: Missing `model` field in the request body."
