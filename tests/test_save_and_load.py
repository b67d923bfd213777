# SPDX-License-Identifier: Apache-2.0
"""Model and processor in one folder: all Auto classes read it, with the package and without."""

import copy
import os

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from helpers.absent import WITHOUT_PACKAGES
from helpers.forked_python import run_python
from helpers.tiny import randomize_auxiliary, tiny_model
from modeling_moma import MomaConfig, MomaForCausalLM, MomaModel
from modeling_moma.routing_moma import MomaRouterBase
from tokenization import MomaProcessor


# loads a folder by its own code and writes what it computes
STRANGER = """
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM,
                          AutoProcessor, AutoTokenizer)

folder, image, output = sys.argv[1:]
trust = {"trust_remote_code": True}
results = {}
names = {}
processor = AutoProcessor.from_pretrained(folder, **trust)
inputs = processor(images=[Image.open(image)], text=["<image>red"], return_tensors="pt")
results["input_ids"] = inputs["input_ids"]
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
    model = auto.from_pretrained(folder, **trust)
    names[auto.__name__] = type(model).__name__
    with torch.no_grad():
        results[auto.__name__] = model(**inputs)[0]
model = AutoModelForCausalLM.from_pretrained(folder, **trust)
prompt = processor(text=["noto: red apple"], return_tensors="pt")
results["codes"] = model.decode_image_tokens(model.generate(**prompt, generation_mode="image", do_sample=False))
drawn = processor.post_process_multimodal_output(results["codes"], generation_mode="image")[0]
results["drawn"] = torch.tensor(bytearray(drawn.tobytes())) / 255
image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
results["pixel_values"] = image_processor(Image.open(image), return_tensors="pt")["pixel_values"]
results["words"] = AutoTokenizer.from_pretrained(folder, **trust)("red apple", return_tensors="pt")["input_ids"]
names["AutoConfig"] = type(AutoConfig.from_pretrained(folder, **trust)).__name__
names["AutoProcessor"] = type(processor).__name__
names["AutoImageProcessor"] = type(image_processor).__name__
results["names"] = names
assert not {"modeling_moma", "tokenization"} & set(sys.modules)
torch.save(results, output)
"""
NAMES = {
    "AutoConfig": "MomaConfig",
    "AutoImageProcessor": "MomaImageProcessor",
    "AutoModel": "MomaModel",
    "AutoModelForCausalLM": "MomaForCausalLM",
    "AutoModelForMultimodalLM": "MomaForCausalLM",
    "AutoProcessor": "MomaProcessor",
}


DEPTH = {"num_hidden_layers": 4, "depth_layers": [0, 2], "depth_capacity": {"text": 0.5, "image": 0.25}}
FIELDS = {
    "untied": {**DEPTH, "untied_attention": True},
    # routed by networks of their own, and with gates that add up to 1
    "auxiliary": {**DEPTH, "auxiliary_routers": True, "inference_routing": "auxiliary", "normalize_gates": True},
}


@pytest.fixture(scope="module", params=FIELDS)
def model(request, processor):
    model = tiny_model(processor, num_experts={"text": 2, "image": 3}, initializer_range=0.3, **FIELDS[request.param])
    for router in routers(model):
        router.threshold.uniform_(0.45, 0.55)
    randomize_auxiliary(model)
    return model


def routers(model):
    return [module for module in model.modules() if isinstance(module, MomaRouterBase)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, processor):
    path = tmp_path_factory.mktemp("saved") / "moma-tiny"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return path


def expected_results(model, processor, image):
    """What the parts give before they are saved, under the keys of `STRANGER`."""
    inputs = processor(images=[Image.open(image)], text=["<image>red"], return_tensors="pt")
    with torch.no_grad():
        hidden, logits = model.model(**inputs)[0], model(**inputs)[0]
    prompt = processor(text=["noto: red apple"], return_tensors="pt")
    codes = model.decode_image_tokens(model.generate(**prompt, generation_mode="image", do_sample=False))
    drawn = processor.post_process_multimodal_output(codes, generation_mode="image")[0]
    return {
        "input_ids": inputs["input_ids"],
        "AutoModel": hidden,
        "AutoModelForCausalLM": logits,
        "AutoModelForMultimodalLM": logits,
        "codes": codes,
        "words": processor.tokenizer("red apple", return_tensors="pt")["input_ids"],
        "drawn": torch.tensor(bytearray(drawn.tobytes())) / 255,
        "pixel_values": processor.image_processor(Image.open(image), return_tensors="pt")["pixel_values"],
    }


def run_stranger(code, *arguments, tmp_path):
    """What code saves to its last argument, in a process without the packages."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    output = tmp_path / "results.pt"
    run = run_python(["-P", "-c", WITHOUT_PACKAGES + code, *arguments, output], cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(output)


def assert_same_results(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # weights mapped from a file lie elsewhere in memory, and products round differently; ids are exact
        tolerance = 1.5 / 255 if name == "drawn" else 1e-5
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)


def test_every_auto_class_loads_the_folder_with_the_package(folder, model, processor, image):
    autos = (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor)
    loaded = {auto.__name__: auto.from_pretrained(folder) for auto in autos}
    assert {name: type(part).__name__ for name, part in loaded.items()} == NAMES
    # the installed classes, not copies of the folder's code
    assert isinstance(loaded["AutoModelForCausalLM"], MomaForCausalLM)
    assert isinstance(loaded["AutoModel"], MomaModel)
    assert isinstance(loaded["AutoProcessor"], MomaProcessor)
    expected = expected_results(model, processor, image)
    found = expected_results(loaded["AutoModelForCausalLM"], loaded["AutoProcessor"], image)
    assert_same_results(found, expected)


def test_every_auto_class_loads_the_folder_by_its_own_code_without_the_package(
    folder, model, processor, image, tmp_path
):
    found = run_stranger(STRANGER, folder, image, tmp_path=tmp_path)
    assert found.pop("names") == NAMES
    expected = expected_results(model, processor, image)
    assert_same_results(found, expected)


# loads a processor beside a model by the tokenizers' package alone
TOKENIZATION_ALONE = """
import sys
from tokenization import MomaProcessor
processor = MomaProcessor.from_pretrained(sys.argv[1])
assert "modeling_moma" not in sys.modules
print(processor(text="red apple")["input_ids"])
"""


def test_a_processor_beside_a_model_needs_no_package_of_the_model(folder, processor):
    run = run_python(["-c", TOKENIZATION_ALONE, folder])
    assert run.returncode == 0, run.stderr[-3000:]
    # nothing is asked, and there is no model to warn of
    assert run.stdout.strip() == str(processor(text="red apple")["input_ids"])
    assert "moma" not in run.stderr, run.stderr


@pytest.mark.parametrize("sizes", [("5GB", "20KB"), ("20KB", "5GB")])
def test_what_was_saved_last_is_loaded_whatever_the_number_of_files(model, tmp_path, sizes):
    changed = copy.deepcopy(model)
    changed.save_pretrained(tmp_path, max_shard_size=sizes[0])
    with torch.no_grad():
        changed.lm_head.weight.add_(1.0)
    changed.save_pretrained(tmp_path, max_shard_size=sizes[1])
    assert torch.equal(MomaForCausalLM.from_pretrained(tmp_path).lm_head.weight, changed.lm_head.weight)
    assert (tmp_path / "model.safetensors").is_file() != (tmp_path / "model.safetensors.index.json").is_file()
    # who may read the settings may read the weights
    assert len({path.stat().st_mode for path in tmp_path.iterdir() if path.is_file()}) == 1


def test_embeddings_below_the_ids_of_the_grammar_cannot_be_saved(model, tmp_path):
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(model.config.vocab_size + 3)
    assert resized.config.vocab_size == model.config.vocab_size + 3
    resized.resize_token_embeddings(20)
    with pytest.raises((ValueError, StrictDataclassError), match="vocab_size"):
        resized.save_pretrained(tmp_path)


def test_configuration_alone_loads_with_the_package(tmp_path, model):
    model.config.save_pretrained(tmp_path)
    for code in tmp_path.glob("*.py"):
        code.unlink()
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MomaConfig)
    assert isinstance(AutoModelForCausalLM.from_config(config), MomaForCausalLM)


def test_two_configurations_do_not_share_their_auto_map():
    first, second = MomaConfig(), MomaConfig()
    first.auto_map["AutoModel"] = "elsewhere.Model"
    assert second.auto_map["AutoModel"] == "modeling_moma.MomaModel"


# loads two folders by a copy of the code each, and writes what the first one generates before and after
TWO_COPIES = """
import sys
import torch
from transformers import AutoModelForCausalLM

first, second, output = sys.argv[1:]
ids = torch.tensor([[30, 31, 32]])
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
options = {"max_new_tokens": 8, "generation_mode": "image", "do_sample": False}
model = load(first)
rows = [model.generate(ids, **options)]
other = load(second)
assert type(other) is not type(model)
rows += [model.generate(ids, **options), model.generate(ids, **options, cache_implementation="static")]
rows += [model.generate(ids, **options, assistant_model=other)]
torch.save(rows, output)
"""


def test_a_second_copy_of_the_code_leaves_the_first_models_alone(tmp_path):
    for name in ("first", "second"):
        tiny_model(depth_layers=[0]).save_pretrained(tmp_path / name)
    first, *later = run_stranger(TWO_COPIES, tmp_path / "first", tmp_path / "second", tmp_path=tmp_path)
    for row in later:
        assert torch.equal(row, first)
