# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_moma.cpu_moma import use_cpu_layers
from modeling_moma.modeling_moma import MomaRMSNorm


SHAPES = ((1, 1, 8), (3, 5, 8), (16, 1, 4, 32), (1, 2048, 64), (0, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("has_form", [False, True])
def test_norms_are_those_of_llama_with_gradients_and_without(has_form, shape, dtype, scale):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * scale).to(dtype)
    before = x.clone()
    mine, theirs = MomaRMSNorm(shape[-1], eps=1e-5).to(dtype).eval(), LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    use_cpu_layers(mine, has_form)
    with torch.no_grad():
        mine.weight.uniform_(0.5, 2, generator=generator)
        theirs.weight.copy_(mine.weight)
        without = mine(x)
    assert without.dtype == dtype and torch.equal(x, before)
    for output in (without, mine(x)):
        # one step of a half-precision number may lie between them
        rtol = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(output, theirs(x), rtol=rtol, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(mine(x), without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_norms_alike_with_gradients_and_without(dtype):
    """Activation checkpointing computes layers in both ways, and has to select the same tokens."""
    norm = MomaRMSNorm(64).to(dtype).train()
    use_cpu_layers(norm)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        without = norm(x)
    assert torch.equal(without, norm(x))
