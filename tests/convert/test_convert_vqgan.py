# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from safetensors.torch import save_file

from modeling_moma.cli import convert
from modeling_moma.convert.reading import CheckpointError
from modeling_moma.convert.vqgan import convert_vqgan, vqgan_config
from tokenization import MomaVQConfig, MomaVQModel


SIZES = {
    "embed_dim": 8,
    "num_embeddings": 16,
    "latent_channels": 12,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
}


def vq_model(**fields):
    torch.manual_seed(0)
    model = MomaVQModel(MomaVQConfig(**{**SIZES, "resolution": 16, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def taming_names(has_attention):
    """Every parameter of a taming VQ-GAN of `SIZES`, spelled out."""
    blocks = ["encoder.down.0.block.0", "encoder.down.1.block.0", "encoder.mid.block_1", "encoder.mid.block_2"]
    blocks += [f"decoder.up.{level}.block.{index}" for level in (0, 1) for index in (0, 1)]
    blocks += ["decoder.mid.block_1", "decoder.mid.block_2"]
    layers = [f"{block}.{layer}" for block in blocks for layer in ("norm1", "conv1", "norm2", "conv2")]
    attentions = ["encoder.mid.attn_1", "decoder.mid.attn_1"]
    if has_attention:
        attentions += ["encoder.down.1.attn.0", "decoder.up.1.attn.0", "decoder.up.1.attn.1"]
    layers += [f"{attention}.{layer}" for attention in attentions for layer in ("norm", "q", "k", "v", "proj_out")]
    layers += ["encoder.down.1.block.0.nin_shortcut", "decoder.up.0.block.0.nin_shortcut"]
    layers += ["encoder.down.0.downsample.conv", "decoder.up.1.upsample.conv", "quant_conv", "post_quant_conv"]
    layers += [f"{side}.{layer}" for side in ("encoder", "decoder") for layer in ("conv_in", "norm_out", "conv_out")]
    return {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")} | {"quantize.embedding.weight"}


def save_ckpt(model, path, **changes):
    tensors = {**model.state_dict(), "loss.discriminator.main.0.weight": torch.zeros(2), **changes}
    torch.save({"state_dict": {name: value for name, value in tensors.items() if value is not None}}, path)
    return path


@pytest.mark.parametrize("attn_resolutions", [None, [8]])
def test_taming_checkpoint_is_the_same_model_after_conversion(tmp_path, attn_resolutions):
    source = vq_model(attn_resolutions=attn_resolutions)
    assert set(source.state_dict()) == taming_names(attn_resolutions is not None)
    path = save_ckpt(source, tmp_path / "vqgan.ckpt")
    convert_vqgan(path, tmp_path / "out", allow_pickle=True, resolution=16)
    converted = MomaVQModel.from_pretrained(tmp_path / "out")
    assert converted.config.resolution == 16
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = source.get_image_tokens(pixels)
    assert torch.equal(converted.get_image_tokens(pixels), codes)
    assert torch.equal(converted.decode_image_tokens(codes), source.decode_image_tokens(codes))


@pytest.mark.parametrize(
    "fields",
    [{}, {"attn_resolutions": [8, 16]}, {"channel_multiplier": [1, 1, 2], "num_res_blocks": 2}, {"attn_type": None}],
)
def test_shapes_tell_the_configuration(fields):
    config = MomaVQConfig(**{**SIZES, "resolution": 16, **fields})
    with torch.device("meta"):
        tensors = MomaVQModel(config).state_dict()
    found = vqgan_config(tensors, resolution=16).to_dict()
    found["attn_resolutions"] = sorted(found["attn_resolutions"] or []) or None
    assert found == config.to_dict()


def test_safetensors_file_needs_no_permission(tmp_path):
    source = vq_model()
    save_file(source.state_dict(), tmp_path / "vqgan.safetensors")
    model = convert_vqgan(tmp_path / "vqgan.safetensors", tmp_path / "out", resolution=16)
    assert torch.equal(model.decoder.conv_out.weight, source.decoder.conv_out.weight)


def test_command_line_converts_and_refuses(tmp_path, capsys):
    path = save_ckpt(vq_model(), tmp_path / "vqgan.ckpt")
    arguments = ["vqgan", "--source", str(path), "--output", str(tmp_path / "out"), "--resolution", "16"]
    assert convert.main(arguments) == 2 and not (tmp_path / "out").exists()
    assert "--allow-pickle" in capsys.readouterr().err
    assert convert.main([*arguments, "--allow-pickle"]) == 0
    assert f"{vq_model().config.num_embeddings} codes" in capsys.readouterr().out
    assert MomaVQModel.from_pretrained(tmp_path / "out").config.resolution == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder.conv_in.weight": None}, 'Missing key.*"decoder.conv_in.weight"'),
        ({"quantize.proj.weight": torch.zeros(2)}, 'Unexpected key.*"quantize.proj.weight"'),
        ({"quant_conv.bias": torch.zeros(3)}, r"quant_conv.bias: .*\[3\].*\[8\]"),
        ({"encoder.conv_in.weight": None}, "encoder.conv_in.weight: missing"),
        ({"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}, "encoder.conv_in.weight: it has no rows"),
        ({"decoder.conv_in.bias": torch.full((64,), torch.nan)}, "decoder.conv_in.bias: it holds NaN"),
        ({"decoder.conv_in.bias": torch.zeros(64, dtype=torch.long)}, "decoder.conv_in.bias: it holds torch.int64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, changes, message):
    path = save_ckpt(vq_model(), tmp_path / "vqgan.ckpt", **changes)
    with pytest.raises(CheckpointError, match=message):
        convert_vqgan(path, tmp_path / "out", allow_pickle=True, resolution=16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("resolution", [0, 10**12, 15])
def test_resolution_that_no_image_has_is_refused(tmp_path, resolution):
    path = save_ckpt(vq_model(), tmp_path / "vqgan.ckpt")
    with pytest.raises(CheckpointError, match=f"resolution.{resolution}"):
        convert_vqgan(path, tmp_path / "out", allow_pickle=True, resolution=resolution)
