# SPDX-License-Identifier: Apache-2.0
"""The chat template of a model that learnt captions and nothing else."""

from tokenization.chat_template_moma import MESSAGE_TEXT


# a message of the user and its answer are one training example: `<bos> picture caption <eos>` or
# `<bos> caption picture <eos>`; what a system message says has no place in one
CHAT_TEMPLATE = (
    "{% for message in messages %}" + MESSAGE_TEXT + "{% if message['role'] == 'user' %}"
    "{{ bos_token + (turn.text | trim) }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ (turn.text | trim) + eos_token }}{% endgeneration %}"
    "{% endif %}"
    "{% endfor %}"
)
