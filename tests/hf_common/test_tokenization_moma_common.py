# SPDX-License-Identifier: Apache-2.0
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
