# SPDX-License-Identifier: Apache-2.0
"""A hostile client, and an honest one after each of its requests. Nothing connects anywhere but to this machine."""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from helpers.released import skip_without_released_model


for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package, reason="`pip install transformers[serving]` is missing")

import httpx  # noqa: E402

from benchmarks.serving_load import FILES, THREADS, Held, held  # noqa: E402
from benchmarks.serving_requests import CHAT, COMPLETIONS, message  # noqa: E402
from helpers.hostile_requests import RESPONSES, hostile_requests  # noqa: E402
from helpers.recorders import recorder  # noqa: E402
from modeling_moma.cli.main import main as moma  # noqa: E402
from modeling_moma.serving.http.command import reserved_names  # noqa: E402
from server_process import running  # noqa: E402


ROOT = Path(__file__).resolve().parents[3]
NAME = "model_cards/moma-emoji"
# seconds that an honest client may wait
PATIENCE = 5.0
MOST_MIB = 64
HONEST = {"messages": message("noto: flag"), "max_tokens": 4, "temperature": 0}


@contextmanager
def hostile_server(folder: Path, arguments: list[str], names: dict, recorders: dict, model: str = NAME):
    """A client of a server that knows only this machine, its process, and the file with what it asked elsewhere."""
    skip_without_released_model()
    table, asked, log = folder / "table.json", folder / "asked.jsonl", folder / "log.txt"
    table.write_text(json.dumps({"names": names, "recorders": recorders}))
    asked.touch()
    command = [sys.executable, str(ROOT / "tests/helpers/one_machine.py"), str(table), str(asked), "serve", model]
    command += ["--device", "cpu", "--dtype", "float32", *arguments]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")])
    variables = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    limits = httpx.Limits(max_keepalive_connections=0)
    with (
        running(command, log, cwd=ROOT, variables=variables) as (address, server),
        httpx.Client(base_url=address, timeout=20, limits=limits, trust_env=False) as client,
    ):
        yield client, psutil.Process(server.pid), asked


def asked_elsewhere(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def honest_answer(client, **more) -> tuple[float, str]:
    """Seconds of an honest request, and its answer."""
    began = time.monotonic()
    response = client.post(CHAT, json=HONEST, timeout=PATIENCE, **more)
    seconds = time.monotonic() - began
    return seconds, response.json()["choices"][0]["message"]["content"] if response.is_success else response.text


def faults_of(hostile, client) -> list[str]:
    """What is wrong with the answers to a hostile request."""
    try:
        answers = hostile.send(client)
    except httpx.HTTPError as error:
        return [f"{hostile.name}: {error!r}"]
    if hostile.names and not answers:
        return [f"{hostile.name}: no answer"]
    allowed = range(400, 500) if hostile.status is None else [hostile.status]
    return [
        f"{hostile.name}: {answer.status_code} {answer.text[:200]}"
        for answer in answers
        if answer.status_code not in allowed
        or hostile.names not in answer.text
        or (answer.status_code == 429 and not answer.headers.get("retry-after", "").isdigit())
    ]


def test_no_hostile_request_holds_up_an_honest_one_or_asks_anybody(tmp_path):
    with recorder() as local, recorder() as metadata, recorder() as elsewhere:
        names = {"images.example": ["93.184.216.34"]}
        recorders = {
            f"127.0.0.1 {local.server_port}": local.server_port,
            "169.254.169.254 80": metadata.server_port,
            "10.0.0.7 443": metadata.server_port,
            "93.184.216.34 80": elsewhere.server_port,
        }
        with hostile_server(tmp_path, [], names, recorders) as (client, process, asked), ExitStack() as held_open:
            _, expected = honest_answer(client)
            for _ in range(5):
                honest_answer(client)
            before, faults, slowest = held(process), [], 0.0
            for hostile in hostile_requests(NAME, local.server_port, held_open):
                faults += faults_of(hostile, client)
                try:
                    seconds, answer = honest_answer(client)
                except httpx.HTTPError as error:
                    faults.append(f"after {hostile.name}: an honest request got {error!r}")
                    break
                slowest = max(slowest, seconds)
                if answer != expected or seconds > PATIENCE:
                    faults.append(f"after {hostile.name}: {answer!r} after {seconds:.1f} s")
            held_open.close()
            after = settled(process, before)
            print(f"the slowest honest answer took {slowest:.2f} s; {before} before, {after} after")
            said = (tmp_path / "log.txt").read_text()
            asked_for = asked_elsewhere(asked), local.asked, metadata.asked, elsewhere.asked
    assert not faults, "\n".join(faults)
    assert asked_for == ([], [], [], [])
    assert after.mib <= before.mib + MOST_MIB
    assert after.files <= before.files + FILES and after.threads <= before.threads + THREADS
    assert "Traceback" not in said


def settled(process, before: Held, seconds: float = 5) -> Held:
    """What the process holds once it is idle."""
    end = time.monotonic() + seconds
    while (now := held(process)).files > before.files and time.monotonic() < end:
        time.sleep(0.1)
    return now


HOSTS = "images.example,images.example:8081,rebound.example,inside.example,private.example,10.0.0.8,metadata.example"
PUBLIC, PRIVATE = "93.184.216.34", "10.0.0.8"
NAMES = {
    "images.example": [PUBLIC],
    # the second question, if there were one, would lead here
    "rebound.example": [PUBLIC, "127.0.0.1"],
    "inside.example": ["10.0.0.7"],
    "private.example": [PRIVATE],
    "metadata.example": ["169.254.169.254"],
    "other.example": [PUBLIC],
}
NOT_FETCHED = "image_url.url: it could not be fetched; the log of the server says why."
NOT_NAMED = "image_url.url: `--image-hosts` does not name its host and port."
ASKED = ["images.example", f"{PUBLIC} 80"]
# address, status, message, and what is asked of whom
FETCHED = [
    ("http://images.example/disc.png", 200, "", ASKED),
    ("http://rebound.example/disc.png", 200, "", ["rebound.example", f"{PUBLIC} 80"]),
    ("http://private.example/disc.png", 200, "", ["private.example", f"{PRIVATE} 80"]),
    (f"http://{PRIVATE}/disc.png", 200, "", [f"{PRIVATE} 80"]),
    ("http://images.example/redirect?/disc.png", 200, "", ASKED * 2),
    ("http://inside.example/disc.png", 400, NOT_FETCHED, ["inside.example"]),
    ("http://metadata.example/disc.png", 400, NOT_FETCHED, ["metadata.example"]),
    (METADATA := "http://169.254.169.254/latest/", 400, NOT_NAMED, []),
    (f"http://images.example/redirect?{METADATA}", 400, NOT_NAMED, ASKED),
    ("http://images.example/redirect?http://other.example/a", 400, NOT_NAMED, ASKED),
    ("http://images.example/redirect?file:///etc/passwd", 400, "no address", ASKED),
    ("http://images.example/redirect?http://inside.example/", 400, NOT_FETCHED, [*ASKED, "inside.example"]),
    ("http://other.example/disc.png", 400, NOT_NAMED, []),
    ("http://images.example:22/", 400, NOT_NAMED, []),
    ("http://images.example@other.example/", 400, NOT_NAMED, []),
    ("http://user:word@images.example/disc.png", 400, NOT_NAMED, []),
    ("http://[::ffff:10.0.0.8]:81/", 400, NOT_NAMED, []),
    # a page that is missing, a port where nobody listens and a redirect without an end are told apart by nobody
    ("http://images.example/missing", 400, NOT_FETCHED, ASKED),
    ("http://images.example:8081/disc.png", 400, NOT_FETCHED, ["images.example", f"{PUBLIC} 8081"]),
    ("http://images.example/redirect?/redirect", 400, NOT_FETCHED, ASKED * 4),
    ("http://images.example/large", 413, "16 MiB", ASKED),
]


TEMPLATE = """{% if tone == 'sour' %}{{ raise_exception('no sour tone') }}{% endif %}{{ ('' + (tone or ''))[:0] }}"""


def with_tone(folder: Path) -> str:
    """The released model with a template that knows a tone, which it takes as a text."""
    copy = folder / "model"
    copy.mkdir()
    for source in (ROOT / NAME).iterdir():
        if source.name != "chat_template.jinja":
            (copy / source.name).symlink_to(source)
    (copy / "chat_template.jinja").write_text(TEMPLATE + (ROOT / NAME / "chat_template.jinja").read_text())
    return str(copy)


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A client of a server with a key that may ask some hosts, the file of what it asks, and who stands for them."""
    skip_without_released_model()
    with recorder() as public, recorder() as private:
        recorders = {f"{PUBLIC} 80": public.server_port, f"{PRIVATE} 80": private.server_port}
        folder = tmp_path_factory.mktemp("named")
        arguments = ["--image-hosts", HOSTS, "--api-key", "a key", "--template-arguments", "tone"]
        with hostile_server(folder, arguments, NAMES, recorders, with_tone(folder)) as (client, _, asked):
            client.headers["authorization"] = "Bearer a key"
            yield client, asked, public, private


@pytest.mark.parametrize(("address", "status", "said", "expected"), FETCHED, ids=[row[0] for row in FETCHED])
def test_named_hosts_alone_are_asked_at_the_address_that_was_checked(named, address, status, said, expected):
    client, asked, public, private = named
    asked.write_text("")
    public.asked.clear()
    private.asked.clear()
    body = {**HONEST, "messages": message({"type": "image_url", "image_url": {"url": address}})}
    response = client.post(CHAT, json=body)
    assert response.status_code == status and said in response.text, response.text
    lines = asked_elsewhere(asked)
    assert all("escaped" not in line for line in lines)
    found = [value for line in lines for value in line.values()]
    assert found == expected
    # whoever is reached is asked by the name of the address
    reached = {f"{PUBLIC} 80", f"{PRIVATE} 80"} & set(expected)
    assert {host for host, _ in public.asked + private.asked} == ({urlsplit(address).hostname} if reached else set())


def test_downloads_that_trickle_hold_up_nobody_else(named):
    client, *_ = named
    body = {
        **HONEST,
        "messages": message({"type": "image_url", "image_url": {"url": "http://images.example/trickle"}}),
    }
    with ThreadPoolExecutor(16) as pool:
        began = time.monotonic()
        trickling = [pool.submit(client.post, CHAT, json=body, timeout=30) for _ in range(12)]
        waits = [honest_answer(client) for _ in range(5)]
        answers = [request.result() for request in trickling]
        seconds = time.monotonic() - began
    assert max(wait for wait, _ in waits) <= PATIENCE and len({answer for _, answer in waits}) == 1
    statuses = [answer.status_code for answer in answers]
    # four at once and four that wait, for ten seconds in all
    assert statuses.count(429) == 4 and statuses.count(400) == 8, statuses
    assert 8 < seconds < 20


def test_all_routes_but_health_ask_for_the_key(named):
    client, *_ = named
    without = httpx.Client(base_url=client.base_url, trust_env=False)
    wrong = httpx.Client(base_url=client.base_url, trust_env=False, headers={"authorization": "Bearer a kez"})
    for stranger in (without, wrong):
        with stranger:
            assert stranger.get("/health").status_code == 200
            for method, path in (("GET", "/v1/models"), ("OPTIONS", "/v1/models"), ("POST", CHAT), ("GET", "/docs")):
                answer = stranger.request(method, path, json=HONEST if method == "POST" else None)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", path
                assert "/model" not in answer.text
    assert client.get("/v1/models").json()["data"][0]["id"].endswith("/model")
    assert client.get("/docs").status_code == 404
    assert client.get(CHAT).status_code == 405
    assert honest_answer(client)[1]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (CHAT, {"stop": None}),
        (CHAT, {"chat_template_kwargs": None, "logit_bias": None, "stream": None}),
        (CHAT, {"generation_config": '{"stop_strings": null, "max_new_tokens": 4}'}),
        (COMPLETIONS, {"stop": None}),
        (RESPONSES, {"parallel_tool_calls": None}),
    ],
)
def test_null_is_as_if_left_out(named, path, change):
    client, *_ = named
    asked = {CHAT: HONEST, COMPLETIONS: {"prompt": "noto: flag"}, RESPONSES: {"input": "noto: flag", "stream": False}}
    answer = client.post(path, json={**asked[path], **change})
    assert answer.status_code == 200, answer.text


def test_this_machine_answers_to_its_addresses_and_to_no_name_that_others_give_it(named):
    client, *_ = named
    for host, status in (
        ("127.0.0.2:8000", 200),
        ("[::1]:8000", 200),
        ("localhost", 200),
        ("127.0.0.2.rebound.example", 421),
        ("localhost.rebound.example", 421),
        ("rebound.example", 421),
        ("0.0.0.0", 421),
        ("2130706433", 421),
    ):
        answer = client.get("/health", headers={"host": host})
        assert answer.status_code == status, (host, answer.text)


def test_what_rules_the_template_is_no_variable_of_it():
    names = {"sanitize_control_tokens", "chat_template", "tokenize", "truncation", "images", "messages"}
    assert names <= reserved_names()


def test_named_arguments_reach_the_template_and_no_others(named):
    client, *_ = named
    for arguments, status, said in (
        ({"tone": "glad"}, 200, "content"),
        ({"tone": [1]}, 400, "tone must be"),
        # what the template says, and what it stumbles over
        ({"tone": "sour"}, 400, "messages: the chat template refuses them: no sour tone"),
        ({"tone": 5}, 400, "messages: the chat template refuses them"),
        ({"chat_template": "a"}, 400, "chat_template"),
    ):
        answer = client.post(CHAT, json={**HONEST, "chat_template_kwargs": arguments})
        assert answer.status_code == status and said in answer.text, answer.text


def test_a_seed_gives_the_same_answer_whoever_else_asks(named):
    client, *_ = named
    settings = '{"do_sample": true, "temperature": 2.0, "max_new_tokens": 12}'
    body = {"messages": message("noto: flag"), "generation_config": settings, "seed": 7}
    others = [{**body, "seed": seed} for seed in range(20)]
    alone = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: client.post(CHAT, json=one).json(), [*others, body, *others, body]))
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[20] == texts[41] == texts[7] == alone and len(set(texts)) > 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--host: '0.0.0.0' lets others in"),
        (["--trust-remote-code"], "--trust-remote-code: requests could have any code run"),
        ([NAME, "--api-key", " "], "--api-key: it is empty"),
        ([NAME, "--image-hosts", "*.example"], "--image-hosts: '*.example' must be the name of a host"),
        ([NAME, "--image-hosts", "https://images.example"], "--image-hosts: 'https://images.example' must be"),
        ([NAME, "--image-hosts", "1.2.3"], "--image-hosts: '1.2.3' must be"),
        ([NAME, "--template-arguments", "chat_template"], "--template-arguments: 'chat_template' rules the template"),
    ],
)
def test_arguments_that_would_let_others_in_are_one_line(arguments, said, capsys):
    assert moma(["serve", *arguments]) == 2
    # libraries may say something when they are first imported
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {said}")
