# SPDX-License-Identifier: Apache-2.0
"""The default chat template, and templates that turn messages of parts into text with placeholders."""

# Jinja for the body of a loop over messages: sets `turn.text`, with a placeholder for each image.
MESSAGE_TEXT = (
    "{% set turn = namespace(text='') %}"
    "{% if message['content'] is string %}"
    "{% set turn.text = message['content'] %}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set turn.text = turn.text + '<image>' %}"
    "{% elif part['type'] == 'text' %}{% set turn.text = turn.text + part['text'] %}"
    "{% else %}{{ raise_exception('content parts must be of type text or image, got ' + part['type']) }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
)
# Turns end with <eos> and headers with a newline, so that no BPE token crosses the edge of a turn.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token | default('', true) }}"
    "{% for message in messages %}" + MESSAGE_TEXT + "{{ message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ turn.text | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ turn.text | trim }}{{ eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
# Jinja to put in front of a template that expects strings: messages of parts become strings, others stay.
_PARTS_TO_TEXT = (
    "{% set flat = namespace(messages=[]) %}"
    "{% for message in messages %}"
    "{% if message['content'] is sequence and message['content'] is not string"
    " and message['content'] is not mapping %}"
    + MESSAGE_TEXT
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

    Args:
        template (`str`):
            Jinja, as Transformers renders it.

    Returns:
        `str`: the new template; the same one where this function has made it already.
    """
    return template if template.startswith(_PARTS_TO_TEXT) else _PARTS_TO_TEXT + template


__all__ = ["DEFAULT_CHAT_TEMPLATE", "MESSAGE_TEXT", "with_image_parts"]
