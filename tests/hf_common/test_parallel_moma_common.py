# SPDX-License-Identifier: Apache-2.0
"""Transformers' own tests of tensor parallelism, expert parallelism and FSDP, with two processes on CPUs."""

import unittest

from transformers_common_tests import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin

from helpers.hf_model_tester import MomaModelTester
from helpers.hf_overrides import DenseParallelOverrides, DepthParallelOverrides, ParallelOverrides
from helpers.slow import slow
from modeling_moma import MomaForCausalLM, MomaModel


# the lists of model types for which Transformers runs them in its own CI
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


class MomaParallelTests(
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_expert_parallel_mixin.ExpertParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    all_model_classes = (MomaModel, MomaForCausalLM)
    fields = {}

    @property
    def model_tester(self):
        return MomaModelTester(self, **self.fields)


class DenseParallelTest(DenseParallelOverrides, MomaParallelTests, unittest.TestCase):
    fields = {"num_experts": 1}


# a full layer of DepthParallelTest is one of these
@slow
class ExpertGroupsParallelTest(ParallelOverrides, MomaParallelTests, unittest.TestCase):
    fields = {"num_experts": {"text": 4, "image": 4}}


class DepthParallelTest(DepthParallelOverrides, MomaParallelTests, unittest.TestCase):
    fields = {"num_experts": {"text": 4, "image": 4}, "depth_layers": [0]}
