# SPDX-License-Identifier: Apache-2.0
"""Launches and waits stay within `limits.toml`, which `python -m helpers.cuda.count` prints as it is now."""

import pytest

from helpers.cuda.cases import CASES, count
from helpers.cuda.limits import excess, read_limits
from helpers.cuda.training import count_pretraining


def test_the_table_has_each_case():
    limits = read_limits()
    assert set(limits) == {*CASES, "pretrain"}
    assert all(set(limits[name]) == set(case.parts) for name, case in CASES.items())


@pytest.mark.parametrize("name", CASES)
def test_a_step_stays_within_its_limits(device, name):
    assert not [line for part, counts in count(name, device) for line in excess(name, part, counts)]


def test_a_step_of_a_training_stays_within_its_limits(device):
    assert not [line for part, counts in count_pretraining(device) for line in excess("pretrain", part, counts)]
