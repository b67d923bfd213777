# SPDX-License-Identifier: Apache-2.0
"""What a hostile client sends to `moma serve`, one kind of harm each."""

import json
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import httpx

from helpers.chat_requests import CHAT, DRAW, address_of, disc, huge_png, image_part, message, png
from helpers.scans import repeated_scan


METADATA = "http://169.254.169.254/latest/meta-data/"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# forbids the end of an answer, which then goes on to the last position
LONG = {"logit_bias": {"2": -100}, "max_tokens": 400}
THOUGHT = {"role": "user", "type": "reasoning", "content": "abc"}
HEADERS = {"content-type": "application/json"}


@dataclass
class Hostile:
    """A request, or several at once.

    Args:
        name: for people.
        send: sends it, and gives the answers that came.
        names: what each answer has to name; empty where clients leave before any answer.
        status: that an answer has to have, or any from 400 to 499.
    """

    name: str
    send: Callable[[httpx.Client], list[httpx.Response]]
    names: str = ""
    status: int | None = None


def post(path: str, body: Any) -> Callable[[httpx.Client], list[httpx.Response]]:
    # JSON of Python's own kind, with NaN and half surrogates
    return lambda client: [client.post(path, content=json.dumps(body), headers=HEADERS)]


def hostile_requests(model: str, local_port: int, held: ExitStack) -> list[Hostile]:
    """
    Some of each kind.

    Args:
        model: that is served.
        local_port: where something else of this machine listens.
        held: closes connections that stay open while others ask.
    """
    good = {"model": model, "messages": message("noto: flag"), "max_tokens": 4, "temperature": 0}
    drawn = {"model": model, "prompt": "noto: flag"}

    def chat(name: str, change: dict, names: str, status: int | None = None) -> Hostile:
        return Hostile(name, post(CHAT, {**good, **change}), names, status)

    def drawing(name: str, change: dict, names: str, status: int | None = None) -> Hostile:
        return Hostile(name, post(DRAW, {**drawn, **change}), names, status)

    def image(name: str, address: str, names: str = "image_url.url") -> Hostile:
        return chat(name, {"messages": message(image_part(address))}, names)

    text, whole = message("a")[0], address_of(png(disc("red")))
    nested = json.dumps(good).removesuffix("}") + ', "top_p": ' + "[" * 900 + "]" * 900 + "}"
    found = [
        # addresses that nobody outside may have asked
        image("the metadata of a cloud", METADATA),
        image("another server of this machine", f"http://127.0.0.1:{local_port}/secret.png"),
        image("the same, of IPv6", f"http://[::1]:{local_port}/secret.png"),
        image("the same, as one number", f"http://2130706433:{local_port}/secret.png"),
        image("the same, in capitals", f"HTTP://LOCALHOST:{local_port}/secret.png"),
        image("a private address", "https://10.0.0.7/secret.png"),
        image("a name that redirects", "http://images.example/to-metadata"),
        image("a name with a password", "http://user:word@images.example/disc.png"),
        image("a file", "/etc/hostname"),
        image("a file by its address", "file:///etc/hostname"),
        # work of a few bytes
        chat("1,000,000 answers", {"n": 1_000_000}, "n", 400),
        chat("many likeliest tokens", {"logprobs": True, "top_logprobs": 1_000_000}, "logprobs"),
        chat("an answer without an end", {"max_tokens": 10**9}, "max_tokens"),
        chat("the same by its other name", {"max_completion_tokens": 10**9}, "max_completion_tokens"),
        chat("settings of one's own", {"generation_config": '{"use_cache": false}'}, "generation_config", 422),
        drawing("1,000,000 drawings", {"n": 1_000_000}, "n", 400),
        drawing("a large drawing", {"size": "100000x100000"}, "size", 400),
        chat("many biases", {"logit_bias": {str(n): 1 for n in range(4000)}}, "logit_bias"),
        chat("a bias that is no number", {"logit_bias": {"5": float("nan")}}, "logit_bias"),
        chat("a temperature of almost 0", {"temperature": 1e-310}, "temperature", 400),
        chat("an infinite temperature", {"temperature": float("inf")}, "temperature"),
        chat("an infinite penalty", {"frequency_penalty": float("inf")}, "frequency_penalty"),
        chat("a penalty that nobody reads", {"presence_penalty": 1e308}, "presence_penalty"),
        chat("many messages", {"messages": message("a") * 5000}, "messages"),
        chat("many images", {"messages": message(*[image_part(whole)] * 60)}, "messages"),
        chat("an image of 900 million pixels", {"messages": message(image_part(address_of(huge_png(30_000))))}, "url"),
        image("a JPEG of many scans", address_of(repeated_scan(600))),
        drawing("many prompts", {"prompt": ["a"] * 1000}, "prompt"),
        chat("the best of many", {"best_of": 1000}, "best_of"),
        drawing("a prompt of 20 MB", {"prompt": "a flag " * 3_000_000}, "prompt"),
        chat("a message of 20 MB", {"messages": message("a flag " * 3_000_000)}, "messages", 413),
        # texts that are none
        chat("half a letter", {"messages": message("\ud800")}, "messages"),
        drawing("half a letter as a prompt", {"prompt": "a\udfff"}, "prompt"),
        chat("the role root", {"messages": [{"role": "root", "content": "a"}]}, "role"),
        chat("a thought that is a message", {"messages": [THOUGHT]}, "messages[0].type"),
        Hostile("a sound", transcription, "audio"),
        Hostile("nested lists", post_text(CHAT, "[" * 200_000), "body"),
        Hostile("nested lists in a field", post_text(CHAT, nested), "top_p"),
        *(Hostile(f"the body {text}", post_text(CHAT, text), "body") for text in ("NaN", "[NaN]", r'"\ud800"', "{")),
        Hostile("millions of values", post_text(CHAT, '{"messages": [' + "[]," * 4_000_000 + "[]]}"), "body", 413),
        Hostile("33 MB", post(CHAT, {**good, "user": "a" * (33 << 20)}), "body", 413),
        Hostile("a body of unknown length", chunked, "length", 411),
        # the server itself
        Hostile("another model is loaded", post("/load_model", {"model": "/etc"}), "load_model"),
        Hostile("the model is unloaded", post("/reset", {}), "reset"),
        Hostile("decisions about an image", post("/v1/systemone", {"assets": {"a": {"url": METADATA}}}), "systemone"),
        Hostile("a name that a page of the web gave this machine", other_host(good), "Host"),
        Hostile("a page of the web", from_page(good), "Origin"),
        # templates
        chat("a name within a template", {"chat_template_kwargs": {"enable_thinking": True}}, "kwargs"),
        chat("a template beside the messages", {"chat_template": LOOPS}, "chat_template"),
        chat("a template within a message", {"messages": [{**text, "chat_template": LOOPS}]}, "chat_template", 422),
        # what holds others up
        Hostile("clients who leave their answers", leaving({**good, **LONG}, 30)),
        Hostile("clients who leave their streams", leaving({**good, **LONG, "stream": True}, 30)),
        Hostile("clients who write slowly", writing_slowly(held, 40)),
        Hostile("more clients than there is room for", crowd({**good, **LONG}, 60), "ask again later", 429),
        image("an image that trickles", f"http://127.0.0.1:{local_port}/trickle"),
        chat("20,000 beams", {"num_beams": 20000}, "num_beams"),
        chat("100,000 stop strings", {"stop": [f"word {n}" for n in range(100_000)]}, "stop"),
        chat("a long stop string", {"stop": "a" * 150_000}, "stop"),
        chat("a template of one's own", {"chat_template_kwargs": {"chat_template": LOOPS}}, "chat_template"),
    ]
    return found


def post_text(path: str, text: str) -> Callable[[httpx.Client], list[httpx.Response]]:
    return lambda client: [client.post(path, content=text.encode(), headers=HEADERS)]


def transcription(client: httpx.Client) -> list[httpx.Response]:
    return [client.post("/v1/audio/transcriptions", files={"file": b"RIFF"}, data={"model": "whisper"})]


def chunked(client: httpx.Client) -> list[httpx.Response]:
    return [client.post(CHAT, content=iter([b"{", b"}"]), headers=HEADERS)]


def other_host(body: dict) -> Callable[[httpx.Client], list[httpx.Response]]:
    return lambda client: [client.post(CHAT, json=body, headers={"host": "rebound.example"})]


def from_page(body: dict) -> Callable[[httpx.Client], list[httpx.Response]]:
    return lambda client: [client.post(CHAT, json=body, headers={"origin": "https://page.example"})]


def raw_request(client: httpx.Client, body: dict) -> bytes:
    content = json.dumps(body).encode()
    host = f"{client.base_url.host}:{client.base_url.port}"
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def connection(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=5)


def leaving(body: dict, clients: int) -> Callable[[httpx.Client], list[httpx.Response]]:
    """Clients who ask, one after the other, and hang up."""

    def send(client: httpx.Client) -> list[httpx.Response]:
        wait = threading.Event()
        for _ in range(clients):
            with connection(client) as asking:
                asking.sendall(raw_request(client, body))
                # so that it is read, and some of it is begun
                wait.wait(0.1)
        return []

    return send


def writing_slowly(held: ExitStack, clients: int) -> Callable[[httpx.Client], list[httpx.Response]]:
    """Clients who write half of a request; they are still there when an honest one asks."""

    def send(client: httpx.Client) -> list[httpx.Response]:
        for _ in range(clients):
            asking = held.enter_context(connection(client))
            asking.sendall(raw_request(client, {"messages": [], "user": "a" * 500})[:-100])
        return []

    return send


def crowd(body: dict, clients: int) -> Callable[[httpx.Client], list[httpx.Response]]:
    """Clients who ask all at once and leave after a while; gives the refusals that came by then."""

    def send(client: httpx.Client) -> list[httpx.Response]:
        found: list[httpx.Response] = []

        def ask():
            with suppress(httpx.TimeoutException):
                answer = client.post(CHAT, json=body, timeout=3)
                # a fast machine has answered some by then
                found.extend([] if answer.status_code == 200 else [answer])

        threads = [threading.Thread(target=ask) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return send
