# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerState

from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.cli import add_layers


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    tiny_model(num_experts={"text": 2, "image": 2}, norm_placement="pre").save_pretrained(folder)
    return folder


def test_folder_is_a_deeper_model_with_its_receipt_and_the_place_in_the_data(model_folder, tmp_path, capsys):
    TrainerState(global_step=5, max_steps=20, train_batch_size=4).save_to_json(
        str(model_folder / "trainer_state.json")
    )
    (model_folder / "run.json").write_text(json.dumps({"examples_a_step": 8, "fingerprint": {"seed": {"seed": 3}}}))
    (model_folder / "optimizer.pt").write_bytes(b"of the model")
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    output = tmp_path / "runs" / "deeper"
    add_layers.main(["--model", str(model_folder), "--after", "1", "0", "--output", str(output)])

    model, deeper = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_folder, output))
    assert (model.config.num_hidden_layers, deeper.config.num_hidden_layers) == (2, 4)
    with torch.no_grad():
        assert torch.equal(deeper(mixed_ids()).logits, model(mixed_ids()).logits)
    receipt = json.loads((output / "layers.json").read_text())
    assert receipt["arguments"] == {"model": str(model_folder), "after": [1, 0], "output": str(output)}
    assert receipt["data_order"] == {"seed": 3, "examples_a_step": 8}
    printed = json.loads(capsys.readouterr().out)
    assert printed["layers"] == receipt["layers"] == {"model": 2, "deeper": 4}
    assert printed["parameters"] == {"model": model.num_parameters(), "deeper": deeper.num_parameters()}
    assert (output / "trainer_state.json").read_bytes() == before["trainer_state.json"]
    expected = {"config.json", "generation_config.json", "layers.json", "model.safetensors", "trainer_state.json"}
    assert {path.name for path in output.iterdir() if path.suffix != ".py"} == expected
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before


def test_no_folder_is_left_where_a_layer_is_not_there(model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"`after` = \[7\]"):
        add_layers.main(["--model", str(model_folder), "--after", "7", "--output", str(tmp_path / "deeper")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
