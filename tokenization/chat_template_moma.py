# SPDX-License-Identifier: Apache-2.0
"""The chat template of a new processor, and the part of it that others share."""

# of a chat template, inside its loop over messages: sets `turn.text`, with a placeholder for every picture
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
# turns end with <eos> and headers with a newline, so that no BPE token straddles the edge of a turn
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
# before a template that wants strings: messages of parts become strings, all others stay what they are
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
    # Transformers drops this newline, and reads what follows as the beginning of a line
    "\n"
)


def with_picture_parts(template: str) -> str:
    """
    A text model's chat template that also takes messages of parts: texts are joined, and `<image>` stands for a
    picture. Messages that are strings come out as ever.

    Args:
        template (`str`):
            Jinja, as Transformers renders it.

    Returns:
        `str`: the template itself where it has been given pictures already.
    """
    return template if template.startswith(_PARTS_TO_TEXT) else _PARTS_TO_TEXT + template


__all__ = ["DEFAULT_CHAT_TEMPLATE", "MESSAGE_TEXT", "with_picture_parts"]
