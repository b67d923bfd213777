# SPDX-License-Identifier: Apache-2.0
"""The scripts that reproduce a result start commands whose recipes and scripts exist."""

import re
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("reproduce*.sh")), ids=lambda path: path.stem)
def test_what_it_starts_exists(script, tmp_path):
    copied = tmp_path / "scripts" / script.name
    copied.parent.mkdir()
    copied.write_text(script.read_text())
    # says what it is asked for, and does nothing
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    started = subprocess.run(
        ["bash", str(copied)], cwd=tmp_path, env={"PYTHON": str(python)}, capture_output=True, text=True
    )
    assert started.returncode == 0, started.stderr
    named = set(re.findall(r"(?:recipes|scripts)/[\w.-]+", started.stdout))
    assert named, started.stdout
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    assert len(re.findall("pretrain", started.stdout)) >= 2
