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
"""Every test of Transformers that we override or skip, each with its reason. There are no others."""

from unittest.mock import patch

from modeling_moma import MomaModel


class MomaOverrides:
    """For every configuration.

    Attributes:
        skipped (`dict[str, str]`): reasons by name of a test; a parametrised test goes by its name before the
            parameters.
    """

    skipped: dict[str, str] = {}

    def setUp(self):
        super().setUp()
        for name, reason in self.skipped.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
        # the test wants outputs of an unscaled model beyond max_position_embeddings to compare a scaled one with; ours
        # refuses them with a ValueError
        if self._testMethodName.startswith("test_model_rope_scaling_from_config"):
            lifted = patch.object(MomaModel, "_check_length", _check_length_if_scaled(MomaModel._check_length))
            lifted.start()
            self.addCleanup(lifted.stop)


def _check_length_if_scaled(check):
    def checked(model, *args):
        if model.config.rope_parameters["rope_type"] != "default":
            check(model, *args)

    return checked


class ExpertGroupsOverrides(MomaOverrides):
    """For groups of experts without depth."""

    skipped = {
        "test_keep_in_fp32_modules_exist": "it asks for all names on the list, and depth routers are among them: "
        "DepthModelTest runs it",
    }


class DenseOverrides(MomaOverrides):
    """For one expert for all tokens and no depth: nothing has a router. The other classes run these."""

    skipped = {
        "test_eager_matches_batched_and_grouped_inference": "a single expert is a plain FFN outside that interface",
        "test_keep_in_fp32_modules_exist": "the list names the routers, and there are none",
        "test_output_router_logits_from_config": "there is no router to have logits",
    }


class DepthOverrides(MomaOverrides):
    """For configurations with depth layers. Nothing is skipped."""

    def test_keep_in_fp32_modules_exist(self):
        """The list names auxiliary routers, which are optional."""
        self.model_tester.fields = {**self.model_tester.fields, "auxiliary_routers": True}
        super().test_keep_in_fp32_modules_exist()

    def test_retain_grad_hidden_states_attentions(self):
        """A depth layer multiplies with the weights of its packed tokens, and returns a copy of them laid out over all
        positions, through which no gradient flows. The test looks at layer 0, so depth moves to layer 1."""
        self.model_tester.fields = {**self.model_tester.fields, "depth_layers": [1]}
        super().test_retain_grad_hidden_states_attentions()
