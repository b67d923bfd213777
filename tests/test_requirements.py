# SPDX-License-Identifier: Apache-2.0
"""What `make test-lowest` holds, and what the README says was tried."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# in the README's section on installing
TRIED = ("torch", "torchvision", "transformers", "accelerate", "datasets")


def test_every_lower_bound_is_a_constraint():
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "lowest.py")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # all of the main dependencies have one
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]}
    assert names <= {line.split("==")[0] for line in lines}
    assert len(lines) == len(set(lines)) and all(re.fullmatch(r"[\w.-]+==[\d.]+\.\*", line) for line in lines)


def test_the_readme_names_the_lowest_versions_that_are_asked_for():
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (tried,) = re.findall(r"Tested with\s.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    rows = dict(re.findall(r"(\w+)\s(\d[\d.]*\d)", tried))
    for name in TRIED:
        (bound,) = [re.search(r">=([\d.]+)", text)[1] for text in requirements if re.match(rf"{name}>", text)]
        assert f"{rows.get(name)}.".startswith(f"{bound}."), name
