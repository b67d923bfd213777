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

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tiny import tiny_model, tiny_processor


SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"
SIDE, CODES = 16, 32


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    processor = tiny_processor()
    tiny_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def picture_file(tmp_path):
    path = tmp_path / "apple.png"
    values = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def copy_folder(folder, target):
    for path in folder.rglob("*"):
        if path.is_file():
            copied = target / path.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())
    return target


def test_command_draws_a_picture(model_folder, tmp_path):
    output = tmp_path / "new" / "picture.png"
    command = [sys.executable, SCRIPT, "--model", model_folder, "--prompt", "noto: red apple", "--mode", "image"]
    done = subprocess.run([*command, "--output", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(output)]
    with Image.open(output) as picture:
        assert picture.size == (SIDE, SIDE)
    assert [path.name for path in output.parent.iterdir()] == ["picture.png"]


def test_several_prompts_give_numbered_pictures_that_follow_the_seed(script, model_folder, tmp_path):
    prompts = ["--prompt", "noto: red apple", "--prompt", "apple"]
    pixels = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        call = ["--model", str(model_folder), *prompts, "--output", str(tmp_path / f"{name}.png"), "--seed", str(seed)]
        sampling = ["--temperature", "0.9", "--top-k", "20", "--top-p", "0.9", "--guidance-scale", "2"]
        assert script.main([*call, *sampling]) == 0
        pixels[name] = [Image.open(tmp_path / f"{name}-{index}.png").tobytes() for index in range(2)]
    assert pixels["a"] == pixels["b"] != pixels["c"]


def test_pictures_are_captioned_one_line_each(script, model_folder, picture_file, capsys):
    call = ["--model", str(model_folder), "--image", str(picture_file), "--image", str(picture_file)]
    assert script.main([*call, "--prompt", "noto:", "--num-beams", "2", "--max-new-tokens", "4"]) == 0
    first, second, *rest = capsys.readouterr().out.split("\n")
    assert first == second and rest == [""]


def test_interleaved_output_is_written(script, model_folder, picture_file, tmp_path):
    call = ["--model", str(model_folder), "--image", str(picture_file), "--mode", "interleaved"]
    assert script.main([*call, "--output", str(tmp_path / "out.png")]) == 0


@pytest.mark.parametrize("part, file", [("model", "model.safetensors"), ("tokenizer", "vq_model/model.safetensors")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_checkpoint_with_non_finite_weights_is_refused_by_name(
    script, model_folder, tmp_path, capsys, part, file, value
):
    folder = copy_folder(model_folder, tmp_path / "broken")
    tensors = load_file(folder / file)
    name = next(name for name in sorted(tensors) if tensors[name].is_floating_point() and tensors[name].ndim > 1)
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / file, metadata={"format": "pt"})
    assert script.main(["--model", str(folder), "--prompt", "apple", "--output", str(tmp_path / "p.png")]) == 2
    error = capsys.readouterr().err
    assert f"the tensor {name!r} holds NaN or infinite values (1 of" in error
    assert not (tmp_path / "p.png").exists()


def test_truncated_picture_ends_with_a_message_and_no_traceback(model_folder, picture_file):
    picture_file.write_bytes(picture_file.read_bytes()[:300])
    command = [sys.executable, SCRIPT, "--model", model_folder, "--image", picture_file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "apple.png" in done.stderr and "truncated" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--prompt, --image: give at least one"),
        (
            ["--prompt", "a", "--prompt", "b", "--image", "x", "--image", "y", "--image", "z"],
            "--prompt: given 2 times",
        ),
        (["--prompt", "a", "--output", "picture"], "--output: 'picture' has no ending"),
        (["--prompt", "a", "--max-new-tokens", "5"], "needs 18 new tokens, but there is room for 5"),
        (["--image", "missing.png"], "missing.png"),
    ],
)
def test_bad_arguments_end_with_a_message(script, model_folder, capsys, arguments, message):
    assert script.main(["--model", str(model_folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_missing_model_ends_with_a_message(script, tmp_path, capsys):
    assert script.main(["--model", str(tmp_path / "nothing"), "--prompt", "a"]) == 2
    assert "nothing" in capsys.readouterr().err
