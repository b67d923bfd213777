# SPDX-License-Identifier: Apache-2.0
"""The image tokenizer and the processor on the device."""

import pytest
import torch

from helpers.cuda.compare import assert_near, assert_same_state, both
from helpers.tiny import noise_images, tiny_processor, tiny_vq_model
from tokenization import MomaVQConfig, MomaVQModel


FIELDS = {
    "base_channels": 16,
    "embed_dim": 8,
    "num_embeddings": 32,
    "latent_channels": 16,
    "resolution": 32,
    "semantic_dim": 6,
    "semantic_hidden_size": 12,
}


def images(count=4, side=32):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("decay", [None, 0.9], ids=["by gradients", "by means"])
def test_training_steps_have_the_numbers_of_the_cpu(device, decay):
    torch.manual_seed(0)
    config = MomaVQConfig.from_preset("small", **FIELDS, **({"codebook_decay": decay} if decay else {}))
    model, copied = both(MomaVQModel(config).train())
    losses = []
    for each in (copied, model):
        pixel_values = images().to(each.device)
        for step in range(2):
            # dropout and revived codes
            torch.manual_seed(step)
            output = each(pixel_values)
            output.loss.backward()
        losses.append(output.loss)
    assert_near(*losses, name="loss")
    assert_same_state(copied, model, rtol=1e-3, atol=1e-4)


def test_codes_and_pictures_are_those_of_the_cpu(device):
    model, copied = both(tiny_vq_model(side=32).eval())
    with torch.no_grad():
        codes, found = model.encode(images()), copied.encode(images().to("cuda"))
        codes, found = (getattr(x, "image_tokens", x) for x in (codes, found))
        assert torch.equal(found.cpu(), codes)
        assert_near(copied.decode(found), model.decode(codes))


def test_a_processor_on_the_device_gives_the_ids_of_the_cpu(device):
    expected, processor = tiny_processor(), tiny_processor().to("cuda")
    inputs = {"images": noise_images(3), "text": ["<image>noto: red", "a <image> and <image>"], "padding": True}
    ids, found = (each(**inputs, return_tensors="pt")["input_ids"] for each in (expected, processor))
    assert torch.equal(found.cpu(), ids)
    codes = torch.arange(32).reshape(2, 16)
    for one, other in zip(processor.decode_images(codes.to("cuda")), expected.decode_images(codes)):
        assert one.tobytes() == other.tobytes()
