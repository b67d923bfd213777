# SPDX-License-Identifier: Apache-2.0
"""Answers of the server of `moma serve`, asked in this process."""

import json

import pytest
import torch
from transformers import ContinuousBatchingConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.serving_requests import address_of, png
from helpers.tiny import noise_images, tiny_model, tiny_processor


for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package, reason="`pip install transformers[serving]` is missing")

from fastapi.testclient import TestClient  # noqa: E402

from modeling_moma import MomaConfig, MomaForCausalLM  # noqa: E402
from modeling_moma.data.encoding import caption_chat_template  # noqa: E402
from modeling_moma.errors_moma import InputError  # noqa: E402
from modeling_moma.serving.http.answering import Answering  # noqa: E402
from modeling_moma.serving.http.downloads import ImageHosts  # noqa: E402
from modeling_moma.serving.http.generation import StoppedText  # noqa: E402
from modeling_moma.serving.http.limits import Limits  # noqa: E402
from modeling_moma.serving.http.server import CheckedServe  # noqa: E402
from tokenization import MomaProcessor  # noqa: E402


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
def test_answer_that_ends_by_itself_at_its_last_token_is_not_called_cut(client, processor, stream):
    ends = {str(processor.tokenizer.eos_token_id): 100}
    assert ask(client, processor, stream, max_tokens=1, logit_bias=ends)[:2] == ("", "stop")
    expected, _, _ = ask(client, processor, max_tokens=1)
    assert expected.isprintable()
    text, reason, usage = ask(client, processor, stream, max_tokens=1, stop=expected[-1])
    assert (text, reason, usage["completion_tokens"]) == (expected[:-1], "stop", 1)
    in_beams = json.dumps({"num_beams": 2, "max_new_tokens": 1})
    assert ask(client, processor, logit_bias=ends, generation_config=in_beams)[:2] == ("", "stop")
    assert ask(client, processor, generation_config=in_beams)[1] == "length"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_stop_string_does_not_begin_in_the_prompt(client, stream):
    def asked(**fields):
        body = {"prompt": "a", "max_tokens": 3, "temperature": 0, **fields}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        lines = answer.text.splitlines() if body.get("stream") else [answer.text]
        choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line]
        return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]

    expected, _ = asked()
    assert expected[0].isprintable() and expected[0] != "\ufffd"
    assert asked(stream=stream, stop="a" + expected[0]) == (expected, "length")


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


@pytest.mark.parametrize("name", [5, ["a"], {"a": 1}, True, 0])
def test_a_model_to_load_whose_name_is_no_text_is_refused(name):
    with client_of(CheckedServe(Limits(), ImageHosts(), **OPTIONS)) as client:
        answer = client.post("/load_model", json={"model": name})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "model", answer.text


@pytest.mark.parametrize(
    ("file", "content"), [("model.safetensors", "cut"), ("config.json", "[]"), ("tokenizer.json", "{}")]
)
def test_a_damaged_model_that_a_request_names_is_not_found(model, processor, tmp_path, file, content):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with client_of(CheckedServe(Limits(), ImageHosts(), **OPTIONS)) as client:
        answer = client.post("/v1/completions", json={"prompt": "a", "model": str(tmp_path)})
    assert answer.status_code == 404, answer.text
    assert answer.json()["error"]["param"] == "model"


@pytest.mark.parametrize("prompt", ["<|image_0|>", "<image>", "<|begin_image|>", "noto: <eos> flag"])
def test_special_tokens_in_a_bare_prompt_are_characters(client, model, processor, prompt):
    answers = []
    for stream in (False, True):
        answer = client.post(
            "/v1/completions", json={"prompt": prompt, "max_tokens": 4, "temperature": 0, "stream": stream}
        )
        assert answer.status_code == 200 and '"error"' not in answer.text, answer.text
        answers.append(answer)
    escaped = processor(
        text=processor.escape_special_tokens(prompt), sanitize_control_tokens=True, return_tensors="pt"
    )
    assert answers[0].json()["usage"]["prompt_tokens"] == escaped["input_ids"].shape[1]
    assert not set(escaped["input_ids"][0].tolist()[1:]) & set(processor.image_token_ids)
    ids = model.generate(**escaped, do_sample=False, max_new_tokens=4)[0, escaped["input_ids"].shape[1] :]
    assert answers[0].json()["choices"][0]["text"] == processor.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("said", ["<image> flag", "<|begin_image|>", "<|image_5|>", "flag <eos> house", "<bos>"])
def test_special_tokens_in_messages_are_characters(client, model, processor, said):
    image = {"type": "image_url", "image_url": {"url": address_of(png(noise_images(1)[0]))}}
    plain = [
        {"role": "user", "content": [image, {"type": "text", "text": said}]},
        {"role": "assistant", "content": said},
    ]
    plain += [{"role": "user", "content": said}]
    chat = [
        {"role": "user", "content": [{"type": "image", "image": noise_images(1)[0]}, {"type": "text", "text": said}]},
        *plain[1:],
    ]
    inputs = processor.apply_chat_template(
        chat,
        sanitize_control_tokens=True,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, length:]
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True)
    body = {"temperature": 0, "max_tokens": 4}
    answer = client.post(CHAT, json={"messages": plain, **body})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == length
    assert answer.json()["choices"][0]["message"]["content"] == expected
    answer = client.post("/v1/responses", json={"input": said, "temperature": 0, "max_output_tokens": 4})
    assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def captions(model, processor, tmp_path_factory):
    """A client of a model that learnt captions, whose template writes no roles."""
    folder, parts = str(tmp_path_factory.mktemp("captions")), (processor.image_processor, processor.tokenizer)
    model.save_pretrained(folder)
    MomaProcessor(*parts, processor.vq_model, chat_template=caption_chat_template()).save_pretrained(folder)
    with client_of(CheckedServe(Limits(pinned=folder), ImageHosts(), force_model=folder, **OPTIONS)) as client:
        yield client


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/responses", {"input": ""}),
        *[
            (CHAT, {"messages": [{"role": role, "content": content}]})
            for role, content in (("user", ""), ("user", []), ("user", None), ("user", "  "), ("system", "Be brief."))
        ],
    ],
)
def test_prompts_that_say_nothing_are_refused(captions, route, body):
    answer = captions.post(route, json=body)
    assert answer.status_code == 400 and "they give an empty prompt" in answer.text, answer.text


def test_images_of_a_request_are_let_go_once_they_are_read(client, processor, monkeypatch):
    seen = []
    generate = Answering._generate

    async def look(self, body, request_id, prompt):
        is_code = torch.isin(prompt.inputs["input_ids"].cpu(), torch.tensor(processor.image_token_ids))
        seen.append((body, int(is_code.sum())))
        return await generate(self, body, request_id, prompt)

    monkeypatch.setattr(Answering, "_generate", look)
    image = address_of(png(noise_images(1)[0]))
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "what is it?"}]
    answer = client.post(CHAT, json={"messages": [{"role": "user", "content": parts}], "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    ((body, num_codes),) = seen
    assert num_codes == processor.image_seq_length and image not in str(body) and "PIL" not in str(body)
    assert body["messages"][0]["content"][1]["text"] == "what is it?"


def test_a_moma_of_text_alone_is_refused_by_what_it_lacks(tmp_path):
    tokenizer = tiny_processor().tokenizer
    config = MomaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        modality_token_ranges={},
        num_experts={"text": 2},
        begin_image_token_id=None,
        end_image_token_id=None,
    )
    MomaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has a tokenizer and no processor"):
        CheckedServe(Limits(pinned=str(tmp_path)), ImageHosts(), force_model=str(tmp_path), **OPTIONS)


@pytest.fixture(scope="module")
def batched(tmp_path_factory):
    """A text model of another kind, which the server batches continuously."""
    folder, tokenizer = str(tmp_path_factory.mktemp("batched")), tiny_processor().tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    server = CheckedServe(Limits(pinned=folder), ImageHosts(), force_model=folder, **OPTIONS, continuous_batching=True)
    small = ContinuousBatchingConfig(page_size=32, num_blocks=16, max_batch_tokens=64)
    # without it the cache takes most of the memory there is
    server._generation_state._cb_config = small
    with client_of(server) as client:
        yield client
    server._generation_state.shutdown()


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": "a"},
        {"temperature": 0.7},
        {"seed": 1},
        {"frequency_penalty": 1.0},
        {"top_p": 0.5},
        {"generation_config": "{}"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_continuous_batching_does_not_do_is_refused(batched, fields):
    answer = batched.post("/v1/completions", json={"prompt": "noto: ", "max_tokens": 4, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == next(iter(fields)) and "--continuous-batching" in error["message"]


def test_continuous_batching_answers_what_it_does(batched):
    texts = []
    for more in ({}, {"temperature": 0}):
        answer = batched.post("/v1/completions", json={"prompt": "noto: ", "max_tokens": 4, **more})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] <= 4
        texts.append(answer.json()["choices"][0]["text"])
    assert texts[0] == texts[1]
