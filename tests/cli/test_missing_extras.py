# SPDX-License-Identifier: Apache-2.0
"""A library of an extra that is not installed: one line that says what to install, and status 2."""

import importlib
import json
import shutil
from importlib import metadata

import pytest
from safetensors.torch import save_file

from helpers.forked_python import run_python
from helpers.tiny import noise_images, tiny_model, tiny_processor, trainer_flags
from modeling_moma.cli.main import main
from modeling_moma.utils.errors import MissingExtraError, needs_extra


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with its processor, images with captions, and their tokens."""
    folder = tmp_path_factory.mktemp("extras")
    processor = tiny_processor()
    processor.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "processor")
    tiny_model(processor).save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    lines = []
    for index, image in enumerate(noise_images(24)):
        image.save(folder / "photos" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"thing {index}"}))
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "recipe.yaml").write_text(
        f"sources:\n  photos: {{data: {folder / 'photos'}, image: image, text: text, held_out: 0.4, min_side: 1}}\n"
        "model: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}\n"
    )
    options = ["--processor", str(folder / "processor"), "--output", str(folder / "tokens"), "--processes", "1"]
    assert main(["tokenize", str(folder / "recipe.yaml"), *options]) == 0
    (folder / "llama").mkdir()
    save_file({}, folder / "llama" / "llama.gguf")
    shutil.copytree(folder / "model", folder / "int8")
    config = json.loads((folder / "int8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "int8" / "config.json").write_text(json.dumps(config))
    return folder


TRAINING = "--processor processor --tokens tokens --output out".split()
TRAINING += trainer_flags(max_steps=1, per_device_train_batch_size=2)
# by extra, commands that need it
COMMANDS = {
    "train": ["train-image-tokenizer", "recipe.yaml", "--output", "vq", "--set", "image_tokenizer.steps=1"],
    "train, drawings": "evaluate --model model --tokens tokens --split validation --measures drawings".split(),
    "finetune": ["pretrain", "recipe.yaml", "--lora-rank", "2", *TRAINING],
    "gguf": "convert llama --source llama --gguf-file llama.gguf --processor processor --output out".split(),
    "quantize": "generate --model int8 --prompt apple --mode text".split(),
    "serve": ["serve", "model"],
    "demo": ["demo", "model"],
}
MODULES = ("efficientnet_lite_pytorch", "peft", "gguf", "bitsandbytes", "fastapi", "gradio")
# one process for all: Transformers asks but once whether a library is there
WITHOUT = f"""
import sys
sys.modules.update(dict.fromkeys({MODULES}))
from modeling_moma.cli.main import main
for name, arguments in {COMMANDS}.items():
    print(name, main(arguments), sep=": ", end="\\0", file=sys.stderr)
"""


def test_a_missing_extra_is_told_in_one_line(place):
    done = run_python(["-c", WITHOUT], cwd=place)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for name, said in zip(COMMANDS, done.stderr.split("\0")):
        *lines, last = said.splitlines()
        (line,) = [line for line in lines if line.startswith("error: ")]
        assert last == f"{name}: 2" and line.endswith(f'pip install "modeling-moma[{name.split(",")[0]}]"'), said


def test_extras_that_are_named_are_extras_of_the_package():
    assert {name.split(",")[0] for name in COMMANDS} <= set(
        metadata.metadata("modeling-moma").get_all("Provides-Extra")
    )


def test_the_cause_of_a_missing_library_is_told():
    with pytest.raises(
        MissingExtraError, match=r'^x needs y \(No module named .no_such.\): pip install "modeling-moma\[z'
    ):
        with needs_extra("x needs y", "z"):
            importlib.import_module("no_such")
