# SPDX-License-Identifier: Apache-2.0
"""Norms and rotations by the package `kernels`, from a repository of this disk: same numbers, same saved folders."""

import json
import os
from pathlib import Path

import pytest

from helpers.forked_python import run_python
from helpers.slow import slow


pytest.importorskip("kernels", minversion="0.17")
ROOT = Path(__file__).resolve().parents[2]
METADATA = {"name": "local", "id": "local", "version": 1, "license": "Apache-2.0", "python-depends": []}
LAYERS = """
import torch
from torch import nn

calls = []

class Norm(nn.Module):
    def forward(self, hidden_states):
        calls.append("norm")
        square = hidden_states.float().square().mean(-1, keepdim=True)
        normed = hidden_states * torch.rsqrt(square + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)

class Rotation(nn.Module):
    def forward(self, query, key, cos, sin, unsqueeze_dim=1):
        calls.append("rotation")
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        sign = torch.ones_like(sin)
        sign[..., : sin.shape[-1] // 2] = -1
        return tuple(x * cos + x.roll(x.shape[-1] // 2, -1) * sign * sin for x in (query, key))
"""
CHILD = """
import sys
from pathlib import Path

import transformers.utils
from transformers.utils import import_utils

# with an older release of the package, Transformers leaves layers as they are
transformers.utils.is_kernels_available = import_utils.is_kernels_available = lambda *_: True

import kernels
import torch

from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.cpu_moma import use_cpu_layers

folder = Path(sys.argv[1])
layers = {"RMSNorm": "Norm", "rotary_pos_emb": "Rotation"}
mapping = {
    name: {"cpu": kernels.LocalLayerRepository(folder / "repository", layer_name=layer)}
    for name, layer in layers.items()
}


def put(model, mapping, mode=kernels.Mode.INFERENCE):
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device="cpu")


def logits(model):
    with torch.no_grad():
        return model(mixed_ids()).logits


def gradients(model):
    model.train()(mixed_ids(), labels=mixed_ids(), use_cache=False).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def saved(model, name):
    model.save_pretrained(folder / name)
    return {path.name: path.read_bytes() for path in (folder / name).iterdir()}


model = tiny_model(depth_layers=[0], qk_norm="rmsnorm", untied_attention=True).eval()
expected, files = logits(model), saved(model, "plain")
put(model, mapping)
(calls,) = [kernel.module.layers.calls for kernel in kernels.get_loaded_kernels()]
# forms for CPUs go and come around what was put in
for enabled in (False, True):
    use_cpu_layers(model, enabled)
    calls.clear()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert set(calls) == {"norm", "rotation"}, calls
assert saved(model, "put") == files
put(model, {})
calls.clear()
assert torch.equal(logits(model), expected) and not calls

plain = gradients(model)
model.zero_grad()
put(model, mapping, kernels.Mode.TRAINING)
found = gradients(model)
assert set(calls) >= {"norm"} and plain.keys() == found.keys()
torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
"""


@slow
def test_layers_of_a_local_repository_give_the_same_numbers_and_folders(tmp_path):
    variant = tmp_path / "repository" / "build" / "torch-cpu"
    variant.mkdir(parents=True)
    (variant / "metadata.json").write_text(json.dumps({**METADATA, "backend": {"type": "cpu"}}))
    (variant / "__init__.py").write_text("from . import layers\n")
    (variant / "layers.py").write_text(LAYERS)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # from an environment that has them off, as that of `make test-next` may
    env = {**os.environ, "PYTHONPATH": paths, "USE_HUB_KERNELS": "1"}
    done = run_python(["-c", CHILD, tmp_path], env=env)
    assert done.returncode == 0, done.stderr
