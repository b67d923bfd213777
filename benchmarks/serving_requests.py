# SPDX-License-Identifier: Apache-2.0
"""What the clients of `benchmarks.serving_load` ask: questions with the answers of `generate`, and bad requests."""

import base64
import io
import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw

from modeling_moma import MomaForCausalLM
from tokenization import MomaProcessor


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS = ("noto: flag", "fluent 3d: ", "noto: red apple", "twemoji: cat")
COLOURS = ("red", "orange", "blue", "black")


@dataclass
class Question:
    """A request in OpenAI's form, and the answer that `generate` gives alone."""

    name: str
    path: str
    body: dict
    answer: str

    def whole(self, answer: dict) -> str:
        """The words of an answer that comes as a whole."""
        choice = answer["choices"][0]
        return choice["text"] if self.path == COMPLETIONS else choice["message"].get("content", "")

    def piece(self, line: str) -> str:
        """The words of a line of a stream."""
        event = json.loads(line.removeprefix("data: "))
        if "choices" not in event:
            return line
        choice = event["choices"][0]
        return choice.get("text", "") if self.path == COMPLETIONS else choice["delta"].get("content", "")


@dataclass
class BadRequest:
    """What cannot be answered, and what the refusal has to name. `content` is what `httpx.post` takes."""

    name: str
    path: str
    content: dict
    names: str


def disc(colour: str, pixels: int = 64) -> Image.Image:
    image = Image.new("RGB", (pixels, pixels), "white")
    ImageDraw.Draw(image).ellipse((pixels // 6, pixels // 8, pixels - pixels // 4, pixels - pixels // 8), fill=colour)
    return image


def address_of(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def huge_png(side: int) -> bytes:
    """The beginning of an image of `side` times `side` pixels: few bytes that a reader allocates much for."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(3 * side + 1) * 16)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def message(*parts: dict | str) -> list[dict]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def image_part(address: str) -> dict:
    return {"type": "image_url", "image_url": {"url": address}}


def questions(model_name: str, new_tokens: int) -> list[Question]:
    """Words and images in messages, and bare prompts."""
    processor = MomaProcessor.from_pretrained(model_name)
    model = MomaForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()

    def answer(inputs: Any) -> str:
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    tensors: dict[str, Any] = {"return_tensors": "pt"}
    settings = {"model": model_name, "max_tokens": new_tokens, "temperature": 0}
    asked = []
    for words in WORDS:
        inputs = processor.apply_chat_template(
            message(words), tokenize=True, return_dict=True, add_generation_prompt=True, **tensors
        )
        asked.append(Question(f"chat {words!r}", CHAT, {**settings, "messages": message(words)}, answer(inputs)))
        inputs = processor(text=[words], **tensors)
        asked.append(Question(f"prompt {words!r}", COMPLETIONS, {**settings, "prompt": words}, answer(inputs)))
    for colour in COLOURS:
        image = disc(colour)
        inputs = processor(images=[image], text=["<image>"], **tensors)
        body = {**settings, "messages": message(image_part(address_of(png(image))))}
        asked.append(Question(f"image {colour!r}", CHAT, body, answer(inputs)))
    return asked


def bad_requests(model_name: str) -> list[BadRequest]:
    """Each with one fault."""
    good = {"model": model_name, "messages": message("noto: flag"), "max_tokens": 4, "temperature": 0}
    whole = png(disc("red"))
    url = "messages[0].content[0].image_url.url"
    images = {
        "broken base64": "data:image/png;base64,@@@@not base64",
        "base64 that is cut": address_of(whole)[:-7],
        "no image": "data:image/png;base64,AAAA",
        "half an image": address_of(whole[: len(whole) // 2]),
        "too many pixels": address_of(huge_png(30_000)),
        "many pixels": address_of(huge_png(9_000)),
        "a file of the server": "/etc/hostname",
        "a host that is not there": "http://127.0.0.1:9/image.png",
    }
    fields = {
        "unknown field": ({"colour": "red"}, "colour"),
        "no messages": ({"messages": None}, "messages"),
        "messages as words": ({"messages": "noto: flag"}, "messages"),
        "an empty list": ({"messages": []}, "messages"),
        "no role": ({"messages": [{"content": "a"}]}, "messages[0].role"),
        "an unknown part": ({"messages": message({"type": "smell", "smell": "rose"})}, "messages[0].content[0].type"),
        "a part without words": ({"messages": message({"type": "text"})}, "messages[0].content[0].text"),
        "an image without an address": ({"messages": message({"type": "image_url"})}, url.removesuffix(".url")),
        "temperature as a word": ({"temperature": "hot"}, "temperature"),
        "temperature below zero": ({"temperature": -1}, "temperature"),
        "top_p above one": ({"top_p": 2}, "top_p"),
        "no tokens": ({"max_tokens": 0}, "max_tokens"),
        "tokens as a word": ({"max_tokens": "many"}, "max_tokens"),
        "seed as a word": ({"seed": "x"}, "seed"),
        "stop as a number": ({"stop": 3}, "stop"),
        "bias of no token": ({"logit_bias": {"10000000": 1}}, "logit_bias"),
        "generation_config that is no JSON": ({"generation_config": "{"}, "generation_config"),
        "another model": ({"model": "someone/else"}, "someone/else"),
        "a prompt that is too long": ({"messages": message("a flag " * 2000)}, "messages"),
        "the same, streamed": ({"messages": message("a flag " * 2000), "stream": True}, "messages"),
        "messages that say nothing": ({"messages": message("")}, "empty prompt"),
    }
    found = [
        BadRequest(name, CHAT, {"json": {**good, "messages": message(image_part(address))}}, url)
        for name, address in images.items()
    ]
    found += [BadRequest(name, CHAT, {"json": {**good, **change}}, names) for name, (change, names) in fields.items()]
    bare = {"model": model_name, "max_tokens": 4}
    contradiction = {"generation_config": json.dumps({"guidance_scale": 3.0, "num_beams": 4})}
    found += [
        BadRequest("no prompt", COMPLETIONS, {"json": bare}, "prompt"),
        BadRequest("a prompt of numbers", COMPLETIONS, {"json": {**bare, "prompt": [1, 2]}}, "prompt"),
        BadRequest("a long prompt", COMPLETIONS, {"json": {**bare, "prompt": "a flag " * 2000}}, "prompt"),
        BadRequest("a response to a number", "/v1/responses", {"json": {"model": model_name, "input": 3}}, "input"),
        BadRequest("settings that contradict", CHAT, {"json": {**good, **contradiction}}, "generation_config"),
        BadRequest("an unknown setting", CHAT, {"json": {**good, "generation_config": '{"colour": 1}'}}, "colour"),
        BadRequest("no JSON", CHAT, {"content": b"{", "headers": {"content-type": "application/json"}}, "body"),
        BadRequest("a list", CHAT, {"json": []}, "body"),
        BadRequest("too many bytes", CHAT, {"json": {**good, "user": "a" * (33 << 20)}}, "body"),
    ]
    return found
