# SPDX-License-Identifier: Apache-2.0
"""The table of launches and waits, `tests/cuda/limits.toml`."""

import tomllib
from functools import cache

from helpers.cuda.device import Counts
from helpers.cuda.launch import ROOT


TABLE = ROOT / "tests" / "cuda" / "limits.toml"


@cache
def read_limits() -> dict[str, dict[str, dict[str, int]]]:
    """By case and part what is allowed at most, `launches`, `fills` and `waits`, and what is aimed at."""
    return tomllib.loads(TABLE.read_text())


def excess(case: str, part: str, counts: Counts) -> list[str]:
    """What is beyond the limits of a part, a line each; where it waits is told with it."""
    limit = read_limits()[case][part]
    found = {"launches": counts.launches, "fills": counts.fills, "waits": counts.waits}
    return [
        f"{case}, {part}: {number} {name}, allowed are {limit[name]}{waits_of(counts) if name == 'waits' else ''}"
        for name, number in found.items()
        if number > limit[name]
    ]


def waits_of(counts: Counts) -> str:
    return "".join(f"\n  {number} x {name}" for name, number in counts.syncs.most_common() if number)
