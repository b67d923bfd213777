# SPDX-License-Identifier: Apache-2.0
"""Transformers' own common model tests, run against a dense model, one with expert groups, and one with depth.

`GenerationTesterMixin` is empty, since the source distribution lacks the generation tests (see `fetch.py`). The suite
asks for it where a class can generate.
"""

import unittest

from transformers import set_seed
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers_common_tests import test_modeling_common
from transformers_common_tests.generation.test_utils import GenerationTesterMixin
from transformers_common_tests.test_modeling_common import ModelTesterMixin
from transformers_common_tests.test_training_mixin import TrainingTesterMixin

from helpers.hf_model_tester import MomaModelTester
from helpers.hf_overrides import DenseOverrides, DepthOverrides, ExpertGroupsOverrides
from modeling_moma import MomaForCausalLM, MomaModel


# 37 is the width that the suite's own testers have had longest
OTHER_EXPERTS = {
    "1x": {"num_experts": 4},
    "8x": {"num_experts": 8, "intermediate_size": 37},
    "4t4i": {"num_experts": {"text": 4, "image": 4}, "expert_intermediate_size": {"text": 20, "image": 37}},
    "1t4i": {"num_experts": {"text": 1, "image": 4}, "intermediate_size": 12},
    "depth": {"num_experts": {"text": 4, "image": 4}, "intermediate_size": 13, "depth_layers": [0]},
}


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

    def test_eager_matches_batched_and_grouped_inference_in_other_configurations(self):
        """The suite's test of implementations, for experts of the widths that no kernel takes as they are, too."""
        for name, fields in OTHER_EXPERTS.items():
            for dtype in ("fp32", "fp16", "bf16"):
                with self.subTest(name, dtype=dtype):
                    set_seed(0)
                    self.model_tester = MomaModelTester(self, **fields)
                    try:
                        test_modeling_common._test_eager_matches_batched_and_grouped_inference(self, name, dtype)
                    except ValueError as error:
                        self.fail(f"{name} in {dtype} is refused: {error}")


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
