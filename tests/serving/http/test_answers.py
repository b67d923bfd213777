# SPDX-License-Identifier: Apache-2.0
"""Answers of the server of `moma serve`, asked in this process."""

import json

import pytest
import torch

from helpers.chat_requests import CHAT, DRAW, address_of, image_part, png
from helpers.tiny import noise_images, tiny_model, tiny_processor


for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package, reason="the extra `serve` is missing")

from fastapi.testclient import TestClient  # noqa: E402

from modeling_moma.data.encoding import caption_chat_template  # noqa: E402
from modeling_moma.serving.http.generation import Answer, Engine, StoppedText  # noqa: E402
from modeling_moma.serving.http.server import build_app  # noqa: E402
from tokenization import MomaProcessor  # noqa: E402


HEADERS = {"content-type": "application/json"}


def client_of(model, processor, **limits):
    app = build_app(Engine(model.eval(), processor, "a/model", **limits))
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def model(processor):
    return tiny_model(processor, seed=3)


@pytest.fixture(scope="module")
def client(model, processor):
    with client_of(model, processor) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "reason"),
    [
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
    answer = client.post(CHAT, json={**body, "stream_options": {"include_usage": True}})
    assert answer.status_code == 200, answer.text
    if not stream:
        choice, usage = answer.json()["choices"][0], answer.json()["usage"]
        return choice["message"]["content"], choice["finish_reason"], usage
    *lines, last, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    chunks, usage = [json.loads(line) for line in lines], json.loads(last)
    assert done == "[DONE]" and usage["choices"] == [] and {chunk["usage"] for chunk in chunks} == {None}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    return text, chunks[-1]["choices"][0]["finish_reason"], usage["usage"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_answer_that_is_cut_says_so(client, model, processor, stream):
    _, reason, usage = ask(client, processor, stream)
    assert (reason, usage["total_tokens"]) == ("length", model.config.max_position_embeddings)
    with client_of(model, processor, max_seconds=1e-6) as hurried:
        _, reason, usage = ask(hurried, processor, stream, max_tokens=50)
    assert reason == "length" and 0 < usage["completion_tokens"] < 50


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_answer_ends_before_its_stop_string(client, processor, stream):
    expected, _, _ = ask(client, processor, max_tokens=40)
    # from the middle of a token on, perhaps
    stop = expected[9:13]
    text, reason, usage = ask(client, processor, stream, max_tokens=40, stop=[stop, "never said"])
    assert text == expected[: expected.index(stop)] and reason == "stop" and usage["completion_tokens"] < 40


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_answer_that_ends_by_itself_at_its_last_token_is_not_called_cut(client, processor, stream):
    ends = {str(processor.tokenizer.eos_token_id): 100}
    assert ask(client, processor, stream, max_tokens=1, logit_bias=ends)[:2] == ("", "stop")
    expected, _, _ = ask(client, processor, max_tokens=1)
    assert expected.isprintable()
    text, reason, usage = ask(client, processor, stream, max_tokens=1, stop=expected[-1])
    assert (text, reason, usage["completion_tokens"]) == (expected[:-1], "stop", 1)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_stop_string_does_not_begin_in_the_prompt(client, processor, stream):
    expected, _, _ = ask(client, processor, max_tokens=3)
    assert expected[0].isprintable() and expected[0] != "\ufffd"
    # the template ends with "assistant" and a new line
    assert ask(client, processor, stream, max_tokens=3, stop="\n" + expected[0])[:2] == (expected, "length")


def test_what_may_begin_a_stop_string_is_held_back():
    pieces = ["a<", "/", "b</", "s", ">c", "d"]
    text = StoppedText(["</s>", "never"])
    assert [text.add(piece) for piece in pieces] == ["a", "", "</b", "", "", ""]
    assert text.end() == ""
    text = StoppedText(["</s>"])
    assert [text.add("a"), text.add("</s"), text.end()] == ["a", "", "</s"]


def test_pieces_of_an_answer_are_its_whole_text_and_hold_no_half_letters(processor):
    tokenizer, text = processor.tokenizer, "é’ 苹果 🍎\U0001f469\u200d\U0001f680 flag"
    generator = torch.Generator().manual_seed(0)
    known = tokenizer(text, add_special_tokens=False)["input_ids"]
    # bytes that are no text, too, and a letter that is cut by the end
    rows = [known, known[:1], *torch.randint(len(tokenizer), (50, 40), generator=generator).tolist()]
    for ids in rows:
        answer = Answer(tokenizer, [], (pieces := []).append)
        answer.put(torch.tensor([[1, 5]]))
        for token in ids:
            answer.put(torch.tensor([token]))
        answer.finish()
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
        if ids == known:
            assert "".join(pieces) == text and len(list(filter(None, pieces))) > 5


@pytest.mark.parametrize("said", ["<image> flag", "<|image_5|>", "flag <eos> house"])
def test_special_tokens_are_characters(client, model, processor, said):
    (image,), words = noise_images(1), {"type": "text", "text": said}
    turns = [{"role": "assistant", "content": said}, {"role": "user", "content": said}]
    plain = [{"role": "user", "content": [image_part(address_of(png(image))), words]}, *turns]
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, words]}, *turns]
    options = {"sanitize_control_tokens": True, "add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template(chat, return_tensors="pt", **options)
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, length:]
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True)
    answer = client.post(CHAT, json={"messages": plain, "temperature": 0, "max_tokens": 4})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == length
    assert answer.json()["choices"][0]["message"]["content"] == expected
    assert client.post(DRAW, json={"prompt": said}).status_code == 200


@pytest.fixture(scope="module")
def captions(model, processor):
    """A client of a model that learnt captions, whose template writes no roles."""
    parts = (processor.image_processor, processor.tokenizer, processor.vq_model)
    with client_of(model, MomaProcessor(*parts, chat_template=caption_chat_template())) as client:
        yield client


@pytest.mark.parametrize(("role", "content"), [("user", []), ("user", None), ("user", "  "), ("system", "Be brief.")])
def test_prompts_that_say_nothing_are_refused(captions, role, content):
    answer = captions.post(CHAT, json={"messages": [{"role": role, "content": content}]})
    assert answer.status_code == 400 and "they give an empty prompt" in answer.text, answer.text


def test_what_a_template_refuses_is_told(model, processor):
    parts = (processor.image_processor, processor.tokenizer, processor.vq_model)
    template = "{{ raise_exception('roles must alternate') }}"
    with client_of(model, MomaProcessor(*parts, chat_template=template)) as client:
        answer = client.post(CHAT, json={"messages": [{"role": "user", "content": "a"}]})
    assert answer.status_code == 400 and "refuses them: roles must alternate" in answer.text, answer.text


def test_developer_reads_as_system_and_what_says_nothing_is_no_field(client):
    asked = {"temperature": 0, "max_tokens": 4, "logprobs": False, "presence_penalty": 0, "tools": [], "user": "a"}
    answers = []
    for role in ("system", "developer", "user"):
        messages = [{"role": role, "content": "noto: flag", "refusal": None}]
        answers.append(client.post(CHAT, json={**asked, "messages": messages}).json())
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0] == texts[1]
    assert answers[0]["usage"] == answers[1]["usage"] != answers[2]["usage"]


def test_a_prompt_that_leaves_no_room_is_refused(client, model):
    said = "flag " * model.config.max_position_embeddings
    for stream in (False, True):
        answer = client.post(CHAT, json={"messages": [{"role": "user", "content": said}], "stream": stream})
        assert answer.status_code == 400 and "leaves no room" in answer.text, answer.text


def test_an_error_of_the_server_says_nothing_of_it(client, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a path of the server")

    monkeypatch.setattr(MomaProcessor, "__call__", fail)
    for path, body in ((CHAT, {"messages": [{"role": "user", "content": "a"}]}), (DRAW, {"prompt": "a"})):
        answer = client.post(path, json=body)
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "a path" not in answer.text


def test_an_error_in_the_middle_of_a_stream_is_its_last_line(client, model, caplog):
    steps = []

    def fail_later(*_):
        steps.append(1)
        if len(steps) > 3:
            raise RuntimeError("a path of the server")

    hook = model.register_forward_hook(fail_later)
    try:
        asked = {"messages": [{"role": "user", "content": "flag"}], "stream": True, "logit_bias": {"2": -100}}
        answer = client.post(CHAT, json=asked)
    finally:
        hook.remove()
    *chunks, error, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert answer.status_code == 200 and chunks and done == "[DONE]"
    assert json.loads(error)["error"]["type"] == "server_error" and "a path" not in answer.text
    assert "a path of the server" in caplog.text


def test_drawings_that_take_too_long_are_refused(model, processor):
    with client_of(model, processor, max_seconds=1e-6) as hurried:
        answer = hurried.post(DRAW, json={"prompt": "flag"})
    assert answer.status_code == 400 and "take more than 1e-06 s" in answer.text, answer.text


def test_an_image_tokenizer_without_a_decoder_draws_nothing(model):
    blind = tiny_processor()
    blind.vq_model.config.use_decoder = False
    with client_of(model, blind) as client:
        answer = client.post(DRAW, json={"prompt": "flag"})
    assert answer.status_code == 400 and "has no decoder" in answer.text, answer.text
