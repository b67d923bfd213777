# SPDX-License-Identifier: Apache-2.0
"""Checks of what a request says, before the server acts on it. Pictures are checked in `pictures.py`."""

import json
from collections.abc import Iterator
from numbers import Real
from typing import Any

from transformers import GenerationConfig

from .errors import RequestError


# name -> lowest and highest value
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, float("inf")),
    "top_p": (0, 1),
    "frequency_penalty": (-0.99, float("inf")),
}
COUNTS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
SEED_BITS = 63
# what the server itself says to the chat template
TEMPLATE_ARGUMENTS = ("add_generation_prompt", "tools", "return_tensors", "return_dict", "tokenize")


def check_settings(body: dict[str, Any]):
    """Check the fields that every kind of request has.

    Raises:
        RequestError: a value of another type, or out of its range.
    """
    for name, (low, high) in NUMBERS.items():
        value = body.get(name)
        if value is not None and not (_is_number(value) and low <= value <= high):
            bounds = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
            raise RequestError(name, f"{value!r} must be a number {bounds}.")
    for name in COUNTS:
        value = body.get(name)
        if value is not None and not (_is_whole(value) and value > 0):
            raise RequestError(name, f"{value!r} must be a whole number of at least 1.")
    seed = body.get("seed")
    if seed is not None and not (_is_whole(seed) and abs(seed) < 2**SEED_BITS):
        raise RequestError("seed", f"{seed!r} must be a whole number of at most {SEED_BITS} bits.")
    for name, kind in (("stream", bool), ("model", str), ("suffix", str), ("tools", list)):
        if body.get(name) is not None and not isinstance(body[name], kind):
            raise RequestError(name, f"{body[name]!r} must be of type {kind.__name__}.")
    _check_stop(body.get("stop"))
    _check_logit_bias(body.get("logit_bias"))
    _check_generation_config(body.get("generation_config"))
    _check_template_arguments(body)


def message_parts(messages: Any, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pictures of messages, each part with its place, after a check of all else.

    Args:
        messages: the body's list of messages.
        field: its name.

    Raises:
        RequestError: no list of messages, one without a role, or a part of a kind that the model cannot read.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError(field, f"{_short(messages)} must be a list of at least one message.")
    for number, message in enumerate(messages):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise RequestError(place, f"{_short(message)} must be an object with `role` and `content`.")
        if not isinstance(message.get("role"), str):
            raise RequestError(
                f"{place}.role", f"{_short(message.get('role'))} must be 'user', 'assistant' or 'system'."
            )
        if message.get("tool_calls"):
            raise RequestError(f"{place}.tool_calls", "the model calls no tools.")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise RequestError(f"{place}.content", f"{_short(content)} must be a text or a list of parts.")
        for index, part in enumerate(content):
            if _is_picture(part, f"{place}.content[{index}]"):
                yield f"{place}.content[{index}]", part


def _is_picture(part: Any, place: str) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{place}.text", f"{_short(part.get('text'))} must be a text.")
        return False
    if kind not in ("image_url", "input_image"):
        raise RequestError(
            f"{place}.type", f"{_short(kind)} must be 'text' or 'image_url': the model reads nothing else."
        )
    return True


def _check_stop(stop: Any):
    words = [stop] if isinstance(stop, str) else stop
    if words is None:
        return
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise RequestError("stop", f"{_short(stop)} must be a text, or a list of texts, none of them empty.")


def _check_logit_bias(bias: Any):
    if bias is None:
        return
    if not isinstance(bias, dict) or not all(str(key).isdecimal() and _is_number(bias[key]) for key in bias):
        raise RequestError("logit_bias", f"{_short(bias)} must give a number for each of some token ids.")
    if not bias:
        raise RequestError("logit_bias", "it is empty: leave it out.")
    # JSON's whole numbers come as such, and generation takes none
    bias.update({key: float(value) for key, value in bias.items()})


def _check_generation_config(text: Any):
    if text is None:
        return
    try:
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}")
        unknown = sorted(set(settings) - set(vars(GenerationConfig())))
        if unknown:
            raise ValueError(f"it has no setting {unknown[0]!r}")
        GenerationConfig(**settings).validate()
    except (ValueError, TypeError, AttributeError) as error:
        raise RequestError(
            "generation_config", f"{_short(text)} must be the JSON of an object of generation settings ({error})."
        ) from error


def _check_template_arguments(body: dict[str, Any]):
    arguments = body.get("chat_template_kwargs")
    if "chat_template_kwargs" not in body:
        return
    if not isinstance(arguments, dict) or any(name in arguments for name in TEMPLATE_ARGUMENTS):
        raise RequestError(
            "chat_template_kwargs",
            f"{_short(arguments)} must be an object without {', '.join(TEMPLATE_ARGUMENTS)}, which the server sets.",
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """A value as a message shows it: bodies may hold pictures."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
