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
"""Transformers' own common model tests, run against a dense model, one with expert groups, and one with depth."""

import unittest

import pytest
import torch
from hf_common.overrides import DenseOverrides, DepthOverrides, ExpertGroupsOverrides
from transformers import set_seed
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers_common_tests.generation.test_utils import GenerationTesterMixin
from transformers_common_tests.test_modeling_common import ModelTesterMixin
from transformers_common_tests.test_training_mixin import TrainingTesterMixin

from modeling_moma import MomaConfig, MomaForCausalLM, MomaModel


class MomaModelTester:
    """Tiny configurations and mixed batches, with the attributes that the mixins read."""

    base_model_class = MomaModel
    causal_lm_class = MomaForCausalLM
    batch_size = 3
    seq_length = 12
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(self, parent, **fields):
        self.parent = parent
        self.fields = fields

    def get_config(self):
        # ids 1 to 19 are text: the overfit test trains on them
        layout = {
            "vocab_size": 99,
            "pad_token_id": 0,
            "bos_token_id": 90,
            "eos_token_id": 91,
            "begin_image_token_id": 92,
            "end_image_token_id": 93,
            "image_seq_length": 4,
            "modality_token_ranges": {"image": [[40, 80]]},
        }
        return MomaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=512,
            **layout,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = torch.randint(1, 90, (self.batch_size, self.seq_length))
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            # used with inputs_embeds, where no ids tell the modality
            "mm_token_type_ids": ((input_ids >= 40) & (input_ids < 80)).long(),
        }
        return config, inputs


class MomaCommonTests(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    all_model_classes = (MomaModel, MomaForCausalLM)
    fields = {}
    model_tester = None

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # the mixins look up by name which classes take labels; the package itself adds MomaForCausalLM
        MODEL_MAPPING_NAMES["moma"] = MomaModel.__name__
        cls.addClassCleanup(MODEL_MAPPING_NAMES.pop, "moma")

    def setUp(self):
        super().setUp()
        # fp16 and bf16 outputs are compared across a threshold that a token may stand on
        set_seed(0)
        self.model_tester = MomaModelTester(self, **self.fields)


class DenseModelTest(DenseOverrides, MomaCommonTests, unittest.TestCase):
    fields = {"num_experts": 1}


class ExpertGroupsModelTest(ExpertGroupsOverrides, MomaCommonTests, unittest.TestCase):
    fields = {"num_experts": {"text": 4, "image": 4}}


class DepthModelTest(DepthOverrides, MomaCommonTests, unittest.TestCase):
    fields = {"num_experts": {"text": 4, "image": 4}, "depth_layers": [0]}

    def test_depth_layer_of_these_tests_processes_some_tokens_and_skips_others(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = MomaModel(config).eval()
        selections = []
        model.layers[0].depth_router.register_forward_hook(lambda module, args, output: selections.append(output[1]))
        model(**inputs)
        chosen_BT = selections[0].chosen_BT
        self.assertTrue(chosen_BT.any())
        self.assertFalse(chosen_BT.all())


@pytest.mark.parametrize("model_test", [DenseModelTest, ExpertGroupsModelTest, DepthModelTest])
def test_every_skip_names_a_test(model_test):
    for name in model_test.skipped:
        assert any(attribute.startswith(name) for attribute in dir(ModelTesterMixin)), name
