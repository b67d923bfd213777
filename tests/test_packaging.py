# SPDX-License-Identifier: Apache-2.0
"""What a user installs: the files of the wheel, the fence around those that travel, and a second import."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from helpers.forked_python import run_python
from modeling_moma.hub.upload import PACKAGES, installed_code


ROOT = Path(__file__).resolve().parent.parent


def test_flat_files_are_those_that_travel():
    flat = {path.name: path for package in PACKAGES for path in package.glob("*.py") if path.stem[0] != "_"}
    # used by trainings alone, but documented among the public names of its package
    assert flat.keys() - installed_code().keys() == {
        "augmentation_moma.py",
        "collation_moma.py",
        "perceptual_moma_vq.py",
    }
    assert all(name.endswith(("_moma.py", "_moma_vq.py")) for name in flat)


def test_what_travels_imports_only_what_travels_and_what_is_installed():
    flat = {path.name: path for package in PACKAGES for path in package.glob("*_moma*.py")}
    for name, file in installed_code().items():
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2 and (node.module or "").split(".")[0] not in ("modeling_moma", "tokenization"), (
                    name
                )
                # Transformers finds what is imported by its lines, and of these no `from . import`
                assert not node.level or f"{node.module}.py" in flat, (name, node.module)


def test_bad_input_is_raised_as_an_input_error():
    # `moma` shows those in one line, and a plain `ValueError` with its traceback
    for path in (path for package in PACKAGES for path in package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                assert not (isinstance(raised, ast.Name) and raised.id == "ValueError"), f"{path}:{node.lineno}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "model_cards", "runs", "build", "*.egg-info", "site", "quickstart")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run([*command, "-w", str(folder)], cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        scripts, plugins = archive.read(entry_points).decode().split("[vllm.general_plugins]")
        assert "moma = modeling_moma.cli.main:main" in scripts
        # where vLLM finds the package
        assert "moma = modeling_moma.serving.vllm.plugin:register" in plugins
    sources = [path for name in ("modeling_moma", "tokenization") for path in (ROOT / name).rglob("*.py")]
    assert files == {str(path.relative_to(ROOT)) for path in sources}


def test_workflow_calls_targets_of_the_makefile():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make browser", "make ${{ matrix.target }}"]
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {*job["strategy"]["matrix"]["target"], "browser"} <= targets


def test_import_twice_and_beside_another_moma_does_not_raise():
    code = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

class TheirConfig(PreTrainedConfig):
    model_type = "moma"

AutoConfig.register("moma", TheirConfig)
import modeling_moma
assert CONFIG_MAPPING["moma"] is modeling_moma.MomaConfig
for name in [name for name in sys.modules if name.split(".")[0] in ("modeling_moma", "tokenization")]:
    del sys.modules[name]
import modeling_moma
assert CONFIG_MAPPING["moma"] is modeling_moma.MomaConfig
assert AutoModelForCausalLM._model_mapping[modeling_moma.MomaConfig] is modeling_moma.MomaForCausalLM
"""
    done = run_python(["-c", code], cwd=ROOT)
    assert done.returncode == 0, done.stderr
