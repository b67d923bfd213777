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
import json
import signal

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import TrainerCallback

from pretrain import build_trainer, main, parse_arguments
from tiny import tiny_processor


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    processor = tiny_processor()
    processor.save_pretrained(folder / "processor")
    rng = np.random.default_rng(0)

    def split(rows, codings):
        return Dataset.from_dict(
            {
                "codes": rng.integers(
                    0, processor.codebook_size, (rows, codings, processor.image_seq_length)
                ).tolist(),
                "style": ["noto"] * rows,
                "label": [f"thing {index}" for index in range(rows)],
                "keywords": [["red", "fruit"]] * rows,
            }
        )

    DatasetDict(train=split(12, 3), validation=split(4, 1)).save_to_disk(folder / "codes")
    config = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    return folder


def arguments(inputs, output, *more):
    names = ("processor", "codes")
    paths = [text for name in names for text in (f"--{name}", str(inputs / name))]
    sizes = "--steps 8 --batch-size 4 --eval-steps 8 --save-steps 4 --logging-steps 1 --warmup-steps 2".split()
    return [*paths, "--config", str(inputs / "config.json"), "--output", str(output), *sizes, *more]


def last_log(output, key):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [log[key] for log in history if key in log][-1]


class KillAfter(TrainerCallback):
    """Ends the process's training the hard way, between a step and its log."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt(signal.SIGKILL)


def test_killed_and_resumed_reaches_the_same_loss_as_uninterrupted(inputs, tmp_path):
    main(arguments(inputs, tmp_path / "whole"))

    trainer = build_trainer(parse_arguments(arguments(inputs, tmp_path / "killed")))
    trainer.add_callback(KillAfter())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    main(arguments(inputs, tmp_path / "killed", "--resume"))

    for key in ("eval_loss", "eval_text_loss", "eval_image_loss"):
        expected = last_log(tmp_path / "whole", key)
        assert last_log(tmp_path / "killed", key) == pytest.approx(expected, abs=1e-6)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    for name, tensor in whole.items():
        torch.testing.assert_close(killed[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_loss_falls(inputs, tmp_path):
    main(arguments(inputs, tmp_path, "--learning-rate", "0.01"))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [log["eval_loss"] for log in history if "eval_loss" in log]
    assert losses[-1] < losses[0]
