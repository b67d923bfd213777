# SPDX-License-Identifier: Apache-2.0
"""Answers of the server of `moma serve`, asked in this process."""

import json

import pytest

from helpers.tiny import tiny_model, tiny_processor


for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package, reason="`pip install transformers[serving]` is missing")

from fastapi.testclient import TestClient  # noqa: E402

from modeling_moma.serving.http.downloads import ImageHosts  # noqa: E402
from modeling_moma.serving.http.limits import Limits  # noqa: E402
from modeling_moma.serving.http.server import CheckedServe  # noqa: E402


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
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


def test_refusals_of_the_handlers_of_transformers_have_that_form_too():
    with client_of(CheckedServe(Limits(), ImageHosts(), **OPTIONS)) as client:
        answer = client.post("/load_model", json={})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == "body: Missing `model` field in the request body."
