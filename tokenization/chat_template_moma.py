# SPDX-License-Identifier: Apache-2.0
"""The default chat template, and templates that turn messages of parts into text with placeholders."""

from collections.abc import Sequence


def message_text(modalities: Sequence[str] = ("image",)) -> str:
    """Return Jinja for the body of a loop over messages: it sets `turn.text`, with a placeholder for each item."""
    placeholders = "".join(
        f"{{% {'elif' if place else 'if'} part['type'] == '{name}' %}}{{% set turn.text = turn.text + '<{name}>' %}}"
        for place, name in enumerate(modalities)
    )
    known = " or ".join([", ".join(["text", *modalities[:-1]]), modalities[-1]])
    return (
        "{% set turn = namespace(text='') %}"
        "{% if message['content'] is string %}"
        "{% set turn.text = message['content'] %}"
        "{% else %}"
        "{% for part in message['content'] %}" + placeholders + "{% elif part['type'] == 'text' %}"
        "{% set turn.text = turn.text + part['text'] %}"
        "{% else %}{{ raise_exception('content parts must be of type " + known + ", got ' + part['type']) }}"
        "{% endif %}"
        "{% endfor %}"
        "{% endif %}"
    )


def default_chat_template(modalities: Sequence[str] = ("image",)) -> str:
    """Return the template of a processor that is given none: turns of `role`, newline, content, `<eos>`.

    Turns end with `<eos>` and headers with a newline, so that no BPE token crosses the edge of a turn.
    """
    return (
        "{{ bos_token | default('', true) }}"
        "{% for message in messages %}" + message_text(modalities) + "{{ message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ turn.text | trim }}{{ eos_token }}{% endgeneration %}"
        "{% else %}"
        "{{ turn.text | trim }}{{ eos_token }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )


DEFAULT_CHAT_TEMPLATE = default_chat_template()
# Jinja to put in front of a template that expects strings: messages of parts become strings, others stay.
_PARTS_TO_TEXT = (
    "{% set flat = namespace(messages=[]) %}"
    "{% for message in messages %}"
    "{% if message['content'] is sequence and message['content'] is not string"
    " and message['content'] is not mapping %}"
    + message_text()
    + "{% set flat.messages = flat.messages + [dict(message, content=turn.text)] %}"
    "{% else %}{% set flat.messages = flat.messages + [message] %}{% endif %}"
    "{% endfor %}"
    "{% set messages = flat.messages %}"
    # Transformers drops this newline, and reads the template after it as the beginning of a line
    "\n"
)


def with_image_parts(template: str) -> str:
    """Make a text model's chat template take messages of parts: texts are joined, an image becomes `<image>`.

    Messages that are strings are rendered as before.
    """
    return template if template.startswith(_PARTS_TO_TEXT) else _PARTS_TO_TEXT + template
