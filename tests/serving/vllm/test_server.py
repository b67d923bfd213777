# SPDX-License-Identifier: Apache-2.0
"""vLLM's own server on a folder, started elsewhere and without `trust_remote_code`, asked by the `openai` client."""

import base64
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.served import CONFIGURATIONS, greedy, prompts, save, served_model
from helpers.server_process import running
from helpers.tiny import noise_images
from modeling_moma.serving.vllm import guided_frame, server_logprobs


pytest.importorskip("vllm", reason="vLLM has an environment of its own: `make test-vllm`")
openai = pytest.importorskip("openai")

START_SECONDS = 240
NAME = "moma"
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def model(processor):
    return served_model(processor, **CONFIGURATIONS["4t4i, threshold"])


@pytest.fixture(scope="module")
def client(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    saved = save(model, processor, folder, "model")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(saved)]
    command += ["--served-model-name", NAME, "--dtype", "float32", "--max-logprobs", "-1"]
    command += ["--host", "127.0.0.1", "--max-num-seqs", "64"]
    # the engine in a process of its own, as vLLM has it, which ends with the server
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": None, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with (
        running(command, folder / "log.txt", seconds=START_SECONDS, cwd=folder, variables=variables) as (address, _),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("no_proxy", "127.0.0.1")
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            yield client


def complete(client, answer):
    """New ids of one request."""
    extra = {"vllm_xargs": {"generation_mode": answer.mode}, "return_token_ids": True}
    got = client.completions.create(
        model=NAME, prompt=answer.prompt, max_tokens=len(answer.ids), temperature=0, extra_body=extra
    )
    return got.choices[0].token_ids


def test_64_requests_at_once_equal_generate(client, model, processor):
    # words of all lengths, images in prompts, and every eighth an image to be drawn
    words = prompts(processor)[6]
    rows = [words[: len(words) - cut] for cut in range(10)]
    answers = [greedy(model, row) for row in rows + prompts(processor)[2:6]]
    answers += [greedy(model, row, "image", None) for row in rows[:2]]
    wanted = answers * 4
    assert len(wanted) == 64
    with ThreadPoolExecutor(64) as pool:
        got = list(pool.map(lambda answer: complete(client, answer), wanted))
    assert got == [answer.ids for answer in wanted]


def test_an_image_in_a_message_is_read_as_the_processor_reads_it(client, model, processor):
    image, png = noise_images(1)[0], io.BytesIO()
    image.save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]}]
    prompt = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True)
    expected = greedy(model, prompt["input_ids"][0])
    messages = [{"role": "user", "content": content}]
    for _ in range(2):
        got = client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=12, temperature=0, extra_body={"return_token_ids": True}
        )
        assert got.prompt_token_ids == expected.prompt
        assert got.choices[0].token_ids == expected.ids
        text = processor.tokenizer.decode(expected.ids, skip_special_tokens=True)
        assert got.choices[0].message.content == text


def test_a_drawn_image_decodes(client, model, processor):
    expected = greedy(model, prompts(processor)[0], "image", None)
    ids = complete(client, expected)
    parts = processor.decode_parts(ids)
    assert len(parts) == 1 and parts[0].size == (16, 16)
    asked = server_logprobs(client, NAME, model.config.vocab_size)
    guided = greedy(model, prompts(processor)[0], "image", None, guidance_scale=3.0)
    assert guided_frame(asked, model.config, guided.prompt, guidance_scale=3.0) == guided.ids != expected.ids


def test_a_bad_request_is_refused_and_others_go_on(client, model, processor):
    with pytest.raises(openai.BadRequestError, match="generation_mode.*must be one of"):
        client.completions.create(
            model=NAME, prompt="noto", max_tokens=4, extra_body={"vllm_xargs": {"generation_mode": "draw"}}
        )
    broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": broken}], max_tokens=4)
    answer = greedy(model, prompts(processor)[1])
    assert complete(client, answer) == answer.ids
