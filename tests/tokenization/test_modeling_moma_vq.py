# SPDX-License-Identifier: Apache-2.0
"""Tests of the image tokenizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

from tokenization.configuration_moma_vq import MomaVQConfig
from tokenization.modeling_moma_vq import ASSIGN_CHUNK, MomaVQModel


CHAMELEON_FIELDS = {
    "base_channels": 32,
    "channel_multiplier": [1, 2, 2],
    "num_res_blocks": 1,
    "embed_dim": 16,
    "num_embeddings": 128,
    "latent_channels": 24,
    "resolution": 32,
}
SMALL_FIELDS = {
    "base_channels": 16,
    "embed_dim": 8,
    "num_embeddings": 32,
    "latent_channels": 16,
    "resolution": 32,
    "semantic_dim": 6,
    "semantic_hidden_size": 12,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MomaVQModel(MomaVQConfig.from_preset("small", **SMALL_FIELDS)).eval()


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def random_chameleon(**fields):
    torch.manual_seed(0)
    model = ChameleonVQVAE(ChameleonVQVAEConfig(**CHAMELEON_FIELDS, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            # everything random, norms and biases too, so that no wrong operation can hide
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "fields", [{}, {"attn_resolutions": [8]}, {"attn_resolutions": [32, 16]}, {"attn_type": None}]
)
def test_codes_equal_those_of_chameleon_with_equal_weights(fields):
    # Chameleon spells "no attention" as any word but "vanilla"
    theirs = random_chameleon(**{name: value or "none" for name, value in fields.items()})
    ours = MomaVQModel(MomaVQConfig(**CHAMELEON_FIELDS, **fields)).eval()
    result = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert {name.split(".")[0] for name in result.missing_keys} == {"decoder"}
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    expected = theirs.encode(images)
    tokens = ours.get_image_tokens(images)
    assert torch.equal(tokens.flatten(), expected.image_tokens.flatten())
    assert tokens.unique().numel() > 20
    torch.testing.assert_close(ours(images).commitment_loss, expected.embedding_loss)


def test_the_full_configuration_has_the_names_and_shapes_of_chameleon_and_of_tamings_decoder():
    with torch.device("meta"):
        ours = MomaVQModel(MomaVQConfig()).state_dict()
        theirs = ChameleonVQVAE(ChameleonVQVAEConfig()).state_dict()
    assert {name: tensor.shape for name, tensor in theirs.items()}.items() <= {
        name: tensor.shape for name, tensor in ours.items()
    }.items()
    decoder = {name for name in ours if name.startswith("decoder.")}
    assert {
        "decoder.conv_in.weight",
        "decoder.mid.block_1.norm1.weight",
        "decoder.mid.attn_1.proj_out.bias",
        "decoder.mid.block_2.conv2.weight",
        "decoder.up.4.upsample.conv.weight",
        "decoder.up.0.block.2.conv1.weight",
        "decoder.norm_out.weight",
        "decoder.conv_out.bias",
    } <= decoder
    # taming narrows at the start of a level: 512 to 256 from level 4 to level 3
    assert ours["decoder.up.3.block.0.nin_shortcut.weight"].shape == (256, 512, 1, 1)
    assert "decoder.up.0.upsample.conv.weight" not in decoder


def test_a_batch_that_passes_in_parts_gives_what_its_images_give_alone(model, monkeypatch):
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    sizes, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda part: (sizes.append(len(part)), encode(part))[1])
    monkeypatch.setattr("tokenization.modeling_moma_vq._CPU_PIXELS", 2 * 32 * 32)
    codes = model.get_image_tokens(images)
    assert sizes == [2, 2, 1] and codes.shape == (5, 16)
    alone = [encode(image[None]) for image in images]
    assert torch.equal(codes, torch.cat([model.quantize(latents)[2] for latents in alone]))
    decoded = model.decode_image_tokens(codes)
    expected = torch.cat([model.decode(model.quantize.lookup(row[None], 4)).clamp(-1, 1) for row in codes])
    torch.testing.assert_close(decoded, expected)


@pytest.mark.parametrize("side", [8, 32, 48])
def test_any_multiple_of_the_factor_encodes_and_decodes(model, side):
    tokens = model.get_image_tokens(torch.rand(2, 3, side, side) * 2 - 1)
    assert tokens.shape == (2, (side // 8) ** 2) and tokens.dtype == torch.long
    decoded = model.decode_image_tokens(tokens)
    assert decoded.shape == (2, 3, side, side)
    assert decoded.abs().max() <= 1


@pytest.mark.parametrize("shape", [(1, 3, 32, 40), (1, 3, 30, 30), (1, 1, 32, 32), (3, 32, 32), (1, 3, 0, 0)])
def test_images_of_another_shape_are_refused(model, shape):
    with pytest.raises(ValueError, match="pixel_values"):
        model.get_image_tokens(torch.zeros(shape))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 15, dtype=torch.long), "15 codes"),
        (torch.full((1, 16), 32), r"32.*\[0, 32\)"),
        (torch.full((1, 16), -1), "-1"),
        (torch.zeros(16, dtype=torch.long), r"\(16,\)"),
        (torch.zeros(1, 0, dtype=torch.long), "0 codes"),
    ],
)
def test_codes_that_give_no_image_are_refused(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model.decode_image_tokens(tokens)


def test_the_position_of_a_code_is_its_raster_position():
    # without attention the decoder sees only the neighbourhood of a code: code 3 is the end of the first of four rows
    config = MomaVQConfig.from_preset("small", **SMALL_FIELDS, attn_type=None)
    torch.manual_seed(0)
    local = MomaVQModel(config).eval()
    tokens = torch.zeros(1, 16, dtype=torch.long)
    changed = tokens.clone()
    changed[0, 3] = 5
    local.quantize.embedding.weight.data.normal_()
    difference = (local.decode_image_tokens(changed) - local.decode_image_tokens(tokens)).abs().mean(dim=1)[0]
    assert difference[:16, 16:].sum() > 0.5 * difference.sum()


def test_forward_gives_the_weighted_sum_of_its_losses(model, images):
    model.config.perceptual_weight = 0.5
    output = model(images, torch.randn(4, 6), perceptual_distance=lambda a, b: (a - b).abs().mean())
    expected = (
        output.reconstruction_loss
        + output.commitment_loss
        + 0.5 * output.perceptual_loss
        + model.config.semantic_weight * output.semantic_loss
    )
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(output.image_tokens, model.get_image_tokens(images))
    assert 1 <= output.codebook_usage <= 32
    assert isinstance(model(images, return_dict=False), tuple)


def test_a_pass_in_training_mode_changes_no_weight_and_no_buffer(model, images):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()(images)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_reconstruction_trains_the_encoder_straight_through_the_codes(model, images):
    # the last convolutions start at zero and would hide what lies before them
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model(images).reconstruction_loss.backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.quantize.embedding.weight.grad is None


def test_a_codebook_without_averages_is_trained_by_gradient(images):
    torch.manual_seed(0)
    model = MomaVQModel(MomaVQConfig.from_preset("small", **{**SMALL_FIELDS, "codebook_decay": None}))
    output = model(images)
    output.loss.backward()
    assert model.quantize.embedding.weight.grad.abs().sum() > 0
    assert not any("ema_" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="codebook_decay=None"):
        model.update_codebook(output.latents, output.image_tokens)


def test_averages_move_used_codes_to_their_latents_by_the_decay(model):
    model.quantize.revive_threshold = 0.0
    before = model.quantize.embedding.weight.detach().clone()
    # the averages start at one use of the code's own vector
    model.quantize.ema_count.fill_(1.0)
    model.quantize.ema_sum.copy_(before)
    latents = torch.randn(2, 8, 4, 4)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    tokens[:, 8:] = 3
    model.update_codebook(latents, tokens)
    vectors = latents.permute(0, 2, 3, 1).reshape(2, 16, 8)
    for code, chosen in ((0, vectors[:, :8]), (3, vectors[:, 8:])):
        total = 0.98 * before[code] + 0.02 * chosen.sum(dim=(0, 1))
        torch.testing.assert_close(model.quantize.embedding.weight[code], total / (0.98 + 0.02 * 16))
    torch.testing.assert_close(model.quantize.embedding.weight[7], before[7])


def test_codes_that_are_not_revived_stay_what_they_are_without_use(model):
    quantize = copy.deepcopy(model.quantize)
    quantize.revive_threshold, quantize.decay = 0.0, 0.5
    before = quantize.embedding.weight.clone()
    vectors, used = torch.randn(6, before.shape[1]), torch.tensor([1, 1, 3, 3, 3, 5])
    for _ in range(300):
        quantize.update(vectors, used)
    after = quantize.embedding.weight
    assert torch.isfinite(after).all()
    for code in range(len(before)):
        expected = vectors[used == code].mean(0) if code in used else before[code]
        torch.testing.assert_close(after[code], expected, rtol=1e-3, atol=1e-3)


def test_dead_codes_become_latents_of_the_batch(model, images):
    model.quantize.ema_count[5] = 0.05
    latents = torch.randn(2, 8, 4, 4) + 10
    tokens = torch.zeros(2, 16, dtype=torch.long)
    model.update_codebook(latents, tokens)
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, 8)
    assert (vectors == model.quantize.embedding.weight[5]).all(dim=1).any()
    assert model.quantize.ema_count[5] == 1
    assert model.quantize.embedding.weight[6].abs().max() < 5


def test_the_first_codebook_lies_where_the_latents_lie(model, images):
    latents = model.encode(images)

    def error():
        return F.mse_loss(model.quantize(latents)[0], latents).item()

    before = error()
    model.initialize_codebook(images)
    assert error() < 0.5 * before
    assert model(images).codebook_usage > 10
    # fewer latents than codes
    model.initialize_codebook(images[:1, :, :8, :8])
    assert model.quantize.embedding.weight.isfinite().all()


@pytest.mark.parametrize(
    ("targets", "message"), [(torch.zeros(4, 5), r"\(4, 6\)"), (torch.zeros(3, 6), r"semantic_targets")]
)
def test_targets_of_another_shape_are_refused(model, images, targets, message):
    with pytest.raises(ValueError, match=message):
        model(images, targets)


def test_targets_for_a_model_without_the_head_are_refused(images):
    model = MomaVQModel(MomaVQConfig.from_preset("small", **{**SMALL_FIELDS, "semantic_dim": None}))
    with pytest.raises(ValueError, match="semantic_dim"):
        model(images, torch.zeros(4, 6))


def test_without_normalisation_each_residual_branch_starts_at_zero(model):
    blocks = [module for module in model.modules() if hasattr(module, "conv2")]
    assert len(blocks) == 2 + 2 + 2 + 4
    assert all(block.conv2.weight.abs().max() == 0 and block.conv1.weight.abs().max() > 0 for block in blocks)


def test_saving_and_loading_keep_codes_and_averages(model, images, tmp_path):
    model.initialize_codebook(images)
    output = model(images)
    model.update_codebook(output.latents, output.image_tokens)
    model.save_pretrained(tmp_path)
    # who may read the settings may read the weights
    assert len({path.stat().st_mode for path in tmp_path.iterdir() if path.is_file()}) == 1
    loaded = MomaVQModel.from_pretrained(tmp_path).eval()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded.get_image_tokens(images), model.get_image_tokens(images))


def test_a_bfloat16_model_tokenises_float32_images(model, images):
    half = model.to(torch.bfloat16)
    tokens = half.get_image_tokens(images)
    assert half.decode_image_tokens(tokens).dtype == torch.bfloat16


def test_pixels_of_a_patch_lie_in_the_order_of_pixel_unshuffle():
    config = MomaVQConfig.from_preset("small", **{**SMALL_FIELDS, "patch_size": 4, "channel_multiplier": (1,)})
    model, seen = MomaVQModel(config).eval(), []
    model.encoder.conv_in.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model.decoder.conv_out.register_forward_hook(lambda module, given, output: seen.append(output))
    pixels_BCHW = torch.rand(2, 3, 32, 32)
    reconstruction = model(pixels_BCHW).reconstruction
    assert torch.equal(seen[0], F.pixel_unshuffle(pixels_BCHW, 4))
    assert torch.equal(reconstruction, F.pixel_shuffle(seen[1], 4))


@pytest.mark.parametrize(
    "fields",
    [{}, {"norm_type": "group", "base_channels": 32, "latent_channels": 32}, {"codebook_decay": None}],
    ids=["small", "norms", "by gradient"],
)
def test_no_images_give_empty_tensors_and_losses_of_zero(fields):
    fields = {**SMALL_FIELDS, "patch_size": 4, "channel_multiplier": (1,), **fields}
    model = MomaVQModel(MomaVQConfig.from_preset("small", **fields)).to(torch.bfloat16)
    none = torch.zeros(0, 3, 32, 32)
    for mode in (True, False):
        model.train(mode)
        output = model(none, torch.zeros(0, 6), lambda first, second: (first - second).abs().mean())
        assert output.latents.shape == (0, 8, 8, 8) and output.latents.dtype == torch.bfloat16
        assert output.reconstruction.shape == none.shape and output.semantic_prediction.shape == (0, 6)
        losses = [output[name].item() for name in output if name.endswith("loss")]
        assert len(losses) == 5 and losses == [0] * 5 and output.codebook_usage == 1
        codes = model.get_image_tokens(none)
        assert codes.shape == (0, 64) and codes.dtype == torch.long
        assert model.decode_image_tokens(codes).shape == model.decode(output.latents).shape == none.shape
    output.loss.backward()
    before = copy.deepcopy(model.state_dict())
    if model.config.codebook_decay is not None:
        model.update_codebook(output.latents, output.image_tokens)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="pixel_values holds no images"):
        model.initialize_codebook(none)


def test_codes_do_not_depend_on_how_many_are_found_at_once(model):
    vectors = torch.randn(2 * ASSIGN_CHUNK + 5, 8)
    expected = torch.cat([model.quantize.assign(part) for part in vectors.split(7)])
    assert torch.equal(model.quantize.assign(vectors), expected)


class SaysCuda(torch.Tensor):
    """A tensor that is taken for one of CUDA."""

    device = torch.device("cuda", 0)  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


def test_codes_are_computed_without_tf32(model, images, monkeypatch):
    def precisions():
        return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision

    before, seen, encode = precisions(), [], model.encode

    def record(pixel_values):
        seen.append(precisions())
        return encode(pixel_values.as_subclass(torch.Tensor))

    monkeypatch.setattr(model, "encode", record)
    assert "ieee" not in before
    codes = model.get_image_tokens(images)
    assert torch.equal(model.get_image_tokens(images.as_subclass(SaysCuda)), codes)
    assert seen == [*[before] * (len(seen) - 1), ("ieee", "ieee")] and precisions() == before
    with pytest.raises(ValueError, match="must have shape"):
        model.get_image_tokens(images[0].as_subclass(SaysCuda))
    monkeypatch.setattr(model.quantize, "nearest", lambda latents: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.get_image_tokens(images.as_subclass(SaysCuda))
    assert precisions() == before
