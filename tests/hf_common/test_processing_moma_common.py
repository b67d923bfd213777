# SPDX-License-Identifier: Apache-2.0
"""Transformers' own common processor tests, run against the processor with a tiny VQ model."""

import unittest

from transformers_common_tests.test_processing_common import ProcessorTesterMixin

from helpers.hf_overrides import ProcessorOverrides
from helpers.tiny import tiny_processor
from tokenization import MomaProcessor


class MomaProcessingTest(ProcessorOverrides, ProcessorTesterMixin, unittest.TestCase):
    processor_class = MomaProcessor
    # images are part of the text
    images_input_name = "input_ids"

    @classmethod
    def _setup_image_processor(cls):
        return tiny_processor().image_processor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_processor().tokenizer

    @staticmethod
    def prepare_processor_dict():
        return {"vq_model": tiny_processor().vq_model}
