# SPDX-License-Identifier: Apache-2.0
"""A hostile client, and an honest one after each of its requests. Nothing connects anywhere but to this machine."""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from helpers.released import skip_without_released_model


for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package, reason="the extra `serve` is missing")

import httpx  # noqa: E402

from helpers.chat_requests import CHAT, DRAW, message  # noqa: E402
from helpers.hostile_requests import hostile_requests  # noqa: E402
from helpers.recorders import recorder  # noqa: E402
from helpers.server_process import running  # noqa: E402
from modeling_moma.cli.main import main as moma  # noqa: E402


ROOT = Path(__file__).resolve().parents[3]
NAME = "model_cards/moma-emoji"
# seconds that an honest client may wait
PATIENCE = 5.0
# the process may have grown by so much at the end
MOST_MIB, FILES, THREADS = 64, 2, 2
HONEST = {"messages": message("noto: flag"), "max_tokens": 4, "temperature": 0}


@dataclass
class Held:
    """What a process holds: MiB of its own, open files with sockets, threads."""

    mib: float
    files: int
    threads: int


def held(process: psutil.Process) -> Held:
    return Held(process.memory_full_info().uss / 2**20, process.num_fds(), process.num_threads())


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
            before, faults = held(process), []
            for hostile in hostile_requests(NAME, local.server_port, held_open):
                faults += faults_of(hostile, client)
                try:
                    seconds, answer = honest_answer(client)
                except httpx.HTTPError as error:
                    faults.append(f"after {hostile.name}: an honest request got {error!r}")
                    break
                if answer != expected or seconds > PATIENCE:
                    faults.append(f"after {hostile.name}: {answer!r} after {seconds:.1f} s")
            held_open.close()
            after = settled(process, before)
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


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of a server with a key."""
    with hostile_server(tmp_path_factory.mktemp("keyed"), ["--api-key", "a key"], {}, {}) as (client, _, _):
        client.headers["authorization"] = "Bearer a key"
        yield client


def test_all_routes_but_health_ask_for_the_key(client):
    without = httpx.Client(base_url=client.base_url, trust_env=False)
    wrong = httpx.Client(base_url=client.base_url, trust_env=False, headers={"authorization": "Bearer a kez"})
    for stranger in (without, wrong):
        with stranger:
            assert stranger.get("/health").status_code == 200
            for method, path in (("GET", "/v1/models"), ("OPTIONS", "/v1/models"), ("POST", CHAT), ("GET", "/docs")):
                answer = stranger.request(method, path, json=HONEST if method == "POST" else None)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", path
                assert NAME not in answer.text
    assert client.get("/v1/models").json()["data"][0]["id"] == NAME
    assert client.get("/docs").status_code == 404
    assert client.get(CHAT).status_code == 405
    assert honest_answer(client)[1]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (CHAT, {"chat_template_kwargs": None, "logit_bias": None, "stream": None}),
        (DRAW, {"size": None, "quality": None}),
    ],
)
def test_null_is_as_if_left_out(client, path, change):
    asked = {CHAT: HONEST, DRAW: {"prompt": "noto: flag"}}
    answer = client.post(path, json={**asked[path], **change})
    assert answer.status_code == 200, answer.text


def test_this_machine_answers_to_its_addresses_and_to_no_name_that_others_give_it(client):
    for host, status in (
        ("127.0.0.2:8000", 200),
        ("[::1]:8000", 200),
        ("localhost", 200),
        ("localhost.rebound.example", 421),
        ("rebound.example", 421),
        ("2130706433", 421),
    ):
        answer = client.get("/health", headers={"host": host})
        assert answer.status_code == status, (host, answer.text)


def test_a_seed_gives_the_same_answer_whoever_else_asks(client):
    body = {"messages": message("noto: flag"), "temperature": 2.0, "max_tokens": 12, "seed": 7}
    others = [{**body, "seed": seed} for seed in range(20)]
    alone = client.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: client.post(CHAT, json=one).json(), [*others, body, *others, body]))
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[20] == texts[41] == texts[7] == alone and len(set(texts)) > 4


def test_a_server_that_others_reach_without_a_key_says_so(capsys):
    # ends before it serves
    for host, warned in (("0.0.0.0", True), ("127.0.0.2", False), ("localhost", False)):
        assert moma(["serve", NAME, "--host", host, "--device", "cuda:99"]) == 2
        assert (f"warning: everybody who reaches {host} is let in" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([NAME, "--api-key", " "], "--api-key: it is empty"),
        ([NAME, "--device", "cuda:99"], "--device: 'cuda:99' cannot be used"),
    ],
)
def test_arguments_that_would_let_others_in_are_one_line(arguments, said, capsys):
    assert moma(["serve", *arguments]) == 2
    # libraries may say something when they are first imported
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {said}")
