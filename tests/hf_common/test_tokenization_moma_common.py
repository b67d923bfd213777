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
"""Transformers' own common tokenizer tests, run against the tokenizer of moma-emoji."""

import unittest
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers_common_tests.test_tokenization_common import TokenizerTesterMixin
from transformers_common_tests.test_tokenizers_backend_mixin import TokenizersBackendTesterMixin

from helpers.hf_overrides import TokenizersBackendOverrides


RELEASED = str(Path(__file__).resolve().parents[2] / "model_cards" / "moma-emoji")


class MomaTokenizationTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = PreTrainedTokenizerFast
    from_pretrained_id = RELEASED


class MomaTokenizersBackendTest(TokenizersBackendOverrides, TokenizersBackendTesterMixin, unittest.TestCase):
    tokenizer_class = PreTrainedTokenizerFast
    from_pretrained_id = RELEASED
