# SPDX-License-Identifier: Apache-2.0
"""`make check` holds the order of folders and model files: import-linter finds each fault that is planted here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
FAULTS = {
    "upwards for types alone": (
        {"modeling_moma/routing_moma.py": "if TYPE_CHECKING:\n    from .modeling_moma import MomaModel\n"},
        "routing_moma -> ",
    ),
    "a circle of siblings": (
        {
            "modeling_moma/utils/one.py": "from .two import second\n",
            "modeling_moma/utils/two.py": "from .one import first\n",
        },
        "siblings BROKEN",
    ),
    "a file that no layer names": ({"modeling_moma/extra_moma.py": ""}, "extra_moma"),
    "a folder from the tokenizer": (
        {"tokenization/extra_moma.py": "import modeling_moma.utils\n"},
        "of the model BROKEN",
    ),
}


def lint(folder: Path) -> tuple[int, str]:
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def checkout(tmp_path):
    for package in ("modeling_moma", "tokenization"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_packages_keep_the_order():
    status, printed = lint(ROOT)
    assert status == 0 and "0 broken" in printed, printed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, checkout):
    files, found = FAULTS[fault]
    for name, text in files.items():
        path = checkout / name
        path.write_text((path.read_text() if path.exists() else "") + text)
    status, printed = lint(checkout)
    assert status == 1 and found in printed, printed
