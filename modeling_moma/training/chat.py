# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
