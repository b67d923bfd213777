# SPDX-License-Identifier: Apache-2.0
"""Checks of messages: nothing is let through that is not known here."""

from typing import Any

from .errors import RequestError, short
from .limits import MAX_MESSAGES, MAX_PARTS
from .pictures import Picture


ROLES = ("user", "assistant", "system")
MESSAGE = ("role", "content", "name", "type", "id", "status")
TEXT_KINDS, PICTURE_KINDS = ("text", "input_text", "output_text"), ("image_url", "input_image")
TEXT, PICTURE = ("type", "text"), ("type", "image_url", "detail")


def read_messages(messages: Any, field: str) -> list[Picture]:
    """
    Checks the messages of a request.

    Args:
        messages: the body's list of messages.
        field: its name.

    Returns:
        Their pictures, not opened yet.

    Raises:
        RequestError: no list of messages, too many, another role, or a part of a kind that the model cannot read.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError(field, f"{short(messages)} must be a list of at least one message.")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(field, f"these are {len(messages)} messages, more than {MAX_MESSAGES}.")
    pictures = []
    for number, message in enumerate(messages):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise RequestError(place, f"{short(message)} must be an object with `role` and `content`.")
        if message.get("role") not in ROLES:
            raise RequestError(f"{place}.role", f"{short(message.get('role'))} must be one of {', '.join(ROLES)}.")
        if message.get("tool_calls"):
            raise RequestError(f"{place}.tool_calls", "the model calls no tools.")
        _refuse_others(message, MESSAGE, place)
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise RequestError(f"{place}.content", f"{short(content)} must be a text or a list of parts.")
        if len(content) > MAX_PARTS:
            raise RequestError(f"{place}.content", f"these are {len(content)} parts, more than {MAX_PARTS}.")
        for index, part in enumerate(content):
            if _is_picture(part, f"{place}.content[{index}]"):
                pictures.append(Picture(part, f"{place}.content[{index}]"))
    return pictures


def _is_picture(part: Any, place: str) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_KINDS:
        _refuse_others(part, TEXT, place)
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{place}.text", f"{short(part.get('text'))} must be a text.")
        return False
    if kind not in PICTURE_KINDS:
        raise RequestError(
            f"{place}.type", f"{short(kind)} must be 'text' or 'image_url': the model reads nothing else."
        )
    _refuse_others(part, PICTURE, place)
    if isinstance(part.get("image_url"), dict):
        _refuse_others(part["image_url"], ("url", "detail"), f"{place}.image_url")
    return True


def _refuse_others(given: dict[str, Any], known: tuple[str, ...], place: str):
    """Clients send back what they got, with empty fields in it; one that says something is refused."""
    for name, value in given.items():
        if name not in known and value:
            raise RequestError(f"{place}.{short(name).strip(chr(39))}", "this server reads no such field.")
