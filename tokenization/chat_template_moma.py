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


__all__ = ["DEFAULT_CHAT_TEMPLATE", "MESSAGE_TEXT"]
