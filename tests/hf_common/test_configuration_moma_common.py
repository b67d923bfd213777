# SPDX-License-Identifier: Apache-2.0
"""Transformers' own common configuration tests, run against the configurations of the model and of the VQ model."""

import unittest

import pytest
from transformers_common_tests.test_configuration_common import ConfigTester

from helpers.hf_model_tester import LAYOUT
from modeling_moma import MomaConfig
from tokenization import MomaVQConfig


CHECKS = sorted(name for name in dir(ConfigTester) if name.startswith(("create_and_test_", "check_")))
MODEL_FIELDS = {
    **LAYOUT,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VQ_FIELDS = {
    "embed_dim": 8,
    "num_embeddings": 32,
    "resolution": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "semantic_dim": 5,
    "codebook_decay": 0.9,
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 1},
        {"num_experts": {"text": 4, "image": 4}},
        {"num_experts": {"text": 4, "image": 4}, "depth_layers": [0], "auxiliary_routers": True},
    ],
    ids=["dense", "expert-groups", "depth"],
)
def test_model_configuration(fields, check):
    getattr(ConfigTester(unittest.TestCase(), MomaConfig, **MODEL_FIELDS, **fields), check)()


@pytest.mark.parametrize("check", CHECKS)
def test_vq_configuration(check):
    names = ["embed_dim", "num_embeddings", "resolution", "downsample_factor"]
    getattr(ConfigTester(unittest.TestCase(), MomaVQConfig, False, names, **VQ_FIELDS), check)()


def test_checks_are_all_that_the_suite_runs():
    ran = []
    tester = ConfigTester(unittest.TestCase(), MomaVQConfig, False, [], **VQ_FIELDS)
    for check in CHECKS:
        setattr(tester, check, lambda check=check: ran.append(check))
    tester.run_common_tests()
    assert sorted(ran) == CHECKS
