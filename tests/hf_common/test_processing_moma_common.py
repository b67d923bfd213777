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
"""Transformers' own common processor tests, run against the processor with a tiny VQ model."""

import unittest

from transformers_common_tests.test_processing_common import ProcessorTesterMixin

from helpers.hf_overrides import ProcessorOverrides
from helpers.tiny import tiny_processor
from tokenization import MomaProcessor


class MomaProcessingTest(ProcessorOverrides, ProcessorTesterMixin, unittest.TestCase):
    processor_class = MomaProcessor
    # pictures are part of the text
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
