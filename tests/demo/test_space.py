# SPDX-License-Identifier: Apache-2.0
"""The Space of the released model: its front matter, its requirements, and the page that its `app.py` builds."""

import errno
import shutil
import tomllib

import pytest
import yaml

from helpers.forked_python import run_python
from helpers.tiny import tiny_model, tiny_processor
from make_space import ROOT, SPACE, main, make_space
from page_images import environment


BUILDS = """
import modeling_moma, app
config = app.demo.get_config_file()
print(modeling_moma.__file__)
print([part["props"]["label"] for part in config["components"] if part["type"] == "tabitem"])
print(sum(part["type"] == "dataset" for part in config["components"]))
"""


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_front_matter_names_this_app_and_a_gradio_that_the_extra_allows():
    packaging = pytest.importorskip("packaging.requirements")
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()
    extras = map(packaging.Requirement, project()["optional-dependencies"]["demo"])
    (gradio,) = (extra for extra in extras if extra.name == "gradio")
    assert gradio.specifier.contains(front["sdk_version"])
    assert packaging.SpecifierSet(project()["requires-python"]).contains(front["python_version"] + ".0")
    # what the Hub asks of the front matter
    assert len(front["short_description"]) <= 60 and front["license"] == "apache-2.0"
    assert {front["colorFrom"], front["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }


def test_the_gradio_that_is_tested_here_is_that_of_the_space():
    gradio = pytest.importorskip("gradio", reason="`pip install 'modeling-moma[demo]'` is missing")
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])
    assert gradio.__version__.split(".")[0] == front["sdk_version"].split(".")[0]


def test_requirements_are_those_of_the_packages():
    assert (SPACE / "requirements.txt").read_text().split() == project()["dependencies"]


def test_app_builds_the_page_from_what_lies_in_the_space(tmp_path):
    pytest.importorskip("gradio", reason="`pip install 'modeling-moma[demo]'` is missing")
    processor = tiny_processor()
    tiny_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    space = make_space(tmp_path / "space", tmp_path / "model")
    built = run_python(["-c", BUILDS], cwd=space, env={**environment(), "PYTHONPATH": str(space)})
    assert built.returncode == 0, built.stderr
    package, tabs, num_examples = built.stdout.splitlines()[-3:]
    assert package == str(space / "modeling_moma" / "__init__.py")
    assert tabs == "['Caption', 'Names', 'Draw', 'Interleaved', 'Routing']"
    # images for three tabs, words for one
    assert num_examples == "4"


def write_model(folder, *more):
    """The names of a model with its processor, and more."""
    processor = ("processor_config.json", "tokenizer.json", "vq_model/config.json", "vq_model/model.safetensors")
    for name in ("config.json", "model.safetensors", *processor, *more):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_a_full_disk_leaves_no_half_of_a_space(tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_model(tmp_path / "model")
    monkeypatch.setattr(shutil, "copyfile", fail)
    assert main(["--output", str(tmp_path / "space"), "--model", str(tmp_path / "model")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_exists_and_a_model_without_weights_are_refused(tmp_path, capsys):
    assert main(["--output", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["--output", str(tmp_path / "space"), "--model", str(tmp_path)]) == 2
    assert "no model.safetensors" in capsys.readouterr().err


def test_codecs_of_a_model_go_with_it_and_one_without_a_processor_is_refused(tmp_path, capsys):
    more = {"audio_codec/codec_config.json", "audio_codec/codebook.safetensors", "additional_chat_templates/a.jinja"}
    write_model(tmp_path / "model", *more, "optimizer.pt", "checkpoint-1/model.safetensors")
    space = make_space(tmp_path / "space", tmp_path / "model")
    found = {path.relative_to(space / "moma-icons").as_posix() for path in (space / "moma-icons").rglob("*.*")}
    assert more < found and not {"optimizer.pt", "checkpoint-1/model.safetensors"} & found
    (tmp_path / "model" / "processor_config.json").unlink()
    assert main(["--output", str(tmp_path / "other"), "--model", str(tmp_path / "model")]) == 2
    assert "has no processor_config.json" in capsys.readouterr().err and not (tmp_path / "other").exists()
