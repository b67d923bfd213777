# SPDX-License-Identifier: Apache-2.0
"""Image tokenizers of Transformers in a MomaProcessor: codes and pixels of the library, squares and rectangles."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tokenizers.processors import ByteLevel
from transformers import (
    AutoProcessor,
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3TextConfig,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAE,
    JanusVQVAEConfig,
    LlamaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from helpers.absent import WITHOUT_PACKAGES
from helpers.forked_python import run_python
from helpers.tiny import CARD, TEXTS, noise_images, tiny_model, tiny_vq_model
from modeling_moma.cli import build_processor, tokenize
from modeling_moma.data.encoding import processor_fingerprint
from modeling_moma.demo.routing_view import SIDE, RoutingView
from modeling_moma.demo.studio import PAPER, DemoSession, PartialImages
from modeling_moma.export.image_tokenizer import export_image_tokenizer
from modeling_moma.hub.loading import open_image_tokenizer
from modeling_moma.hub.upload import check_loads
from tokenization import (
    MomaImageProcessor,
    MomaImageProcessorPil,
    MomaProcessor,
    MomaVQModel,
    add_image_tokens,
    train_text_tokenizer,
)
from tokenization.image_tokenizers_moma import LibraryImageTokenizer, number_of_codes


# two halvings: four pixels a code
JANUS = JanusVQVAEConfig(
    embed_dim=4,
    num_embeddings=24,
    latent_channels=8,
    base_channels=32,
    channel_multiplier=[1, 1, 1],
    num_res_blocks=1,
    num_patches=4,
    projection_dim=8,
    image_token_embed_dim=32,
)
EMU3 = Emu3VQVAEConfig(
    codebook_size=24,
    embed_dim=4,
    latent_channels=4,
    base_channels=32,
    channel_multiplier=[1, 1, 1],
    num_res_blocks=1,
    attn_resolutions=[2],
    hidden_size=32,
    temporal_downsample_factor=2,
)


def library_model(name):
    torch.manual_seed(0)
    model = JanusVQVAE(JANUS) if name == "janus" else Emu3VQVAE(EMU3)
    latents = []
    hook = model.quantize.register_forward_pre_hook(lambda module, arguments: latents.append(arguments[0]))
    # of one colour each, so that many codes are in use
    pixel_values = (torch.rand(24, 3, 1, 1) * 2 - 1).expand(24, 3, 16, 16)
    with torch.no_grad():
        model.encode(pixel_values, *([[(16, 16)] * 24] if name == "emu3" else []))
        hook.remove()
        vectors = latents[0].mean((-2, -1))
        model.quantize.embedding.weight.copy_(vectors.reshape(24, 4))
    return model.eval()


def library_processor(name, size=(16, 16), cls=MomaImageProcessor):
    tokenizer = add_image_tokens(train_text_tokenizer(TEXTS * 3, vocab_size=300), 24)
    return MomaProcessor(cls.for_resolution(size), tokenizer, library_model(name))


def codes_of_the_library(model, pixel_values):
    if isinstance(model, JanusVQVAE):
        return model.encode(pixel_values).image_tokens.view(len(pixel_values), -1)
    # one by one: the library's batches are images of many sizes
    found = [model.encode(image[None], [image.shape[-2:]]).image_tokens[0] for image in pixel_values]
    return torch.stack([codes.flatten() for codes in found])


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)) for _ in range(3)]
    return [*noise, Image.new("RGB", (40, 16), "red"), Image.new("RGB", (9, 50), "blue")]


@pytest.mark.parametrize(
    "name, size", [("janus", (16, 16)), ("janus", (8, 24)), ("emu3", (16, 16)), ("emu3", (24, 8))], ids=str
)
@torch.no_grad()
def test_codes_and_pixels_are_those_of_the_library(name, size, images):
    processor, model = library_processor(name, size), library_model(name)
    assert processor.image_size == size and processor.image_grid == (size[0] // 4, size[1] // 4)
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    codes = processor.encode_images(images)
    expected = codes_of_the_library(model, pixel_values)
    assert codes == expected.tolist() and len({tuple(row) for row in codes}) == len(images)
    grid = expected if name == "janus" else expected.unflatten(1, processor.image_grid)
    # the grid of the library's class is square until it is set
    model.quantize.quant_state_dims = list(processor.image_grid)
    pixels = model.decode(grid).clamp(-1, 1)
    torch.testing.assert_close(processor.vq_model.decode_image_tokens(expected), pixels, rtol=0, atol=1e-6)
    drawn = processor.decode_images(codes)
    assert all(image.size == (size[1], size[0]) for image in drawn)


@pytest.mark.parametrize("name", ["janus", "emu3"])
def test_codes_do_not_depend_on_autocast(name):
    processor, noise = library_processor(name), noise_images(16)
    codes = processor.encode_images(noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert processor.encode_images(noise) == codes


@pytest.mark.parametrize(
    "given, size, cls",
    [
        ((64, 64), (16, 24), MomaImageProcessor),
        ((10, 300), (48, 8), MomaImageProcessorPil),
        ((300, 10), (48, 8), MomaImageProcessor),
        ((1, 5), (8, 48), MomaImageProcessor),
        ((97, 31), (16, 24), MomaImageProcessorPil),
    ],
    ids=str,
)
def test_rectangles_are_filled_by_images_of_any_shape(given, size, cls):
    # nothing of a white image is padded, and the middle of an image stays its middle
    width, height = given
    white = Image.new("RGB", given, "white")
    pixel_values = cls.for_resolution(size)(white, return_tensors="pt")["pixel_values"]
    assert tuple(pixel_values.shape) == (1, 3, *size) and (pixel_values == 1).all()
    if min(given) > 5:
        marked = np.full((height, width, 3), 255, np.uint8)
        marked[: height // 2] = 0
        shown = cls.for_resolution(size)(Image.fromarray(marked), return_tensors="pt")["pixel_values"][0, 0]
        dark = (shown < 0).float().mean(1)
        assert 0.3 < dark.mean() < 0.7 and dark[0] == 1 and dark[-1] == 0


def test_squares_are_cropped_as_before(images):
    plain = MomaImageProcessor.for_resolution(16)
    as_pair = MomaImageProcessor.for_resolution((16, 16))
    for image in images:
        one, other = (each(image, return_tensors="pt")["pixel_values"] for each in (plain, as_pair))
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["janus", "emu3"])
def test_saved_processor_is_loaded_with_the_package_and_without(name, images, tmp_path):
    processor = library_processor(name, (16, 24))
    model = tiny_model(processor)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    # who may read the settings may read the weights
    assert len({path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}) == 1
    (tmp_path / "saved" / "README.md").write_text(CARD)
    saved = json.loads((tmp_path / "saved" / "vq_model" / "config.json").read_text())
    assert saved["architectures"] == [type(library_model(name)).__name__]
    check_loads(tmp_path / "saved")
    codes = processor.encode_images(images)
    loaded = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded.vq_model, LibraryImageTokenizer)
    assert loaded.encode_images(images) == codes and loaded.token_layout() == processor.token_layout()
    images[0].save(tmp_path / "image.png")
    code = """
import json, sys
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoProcessor

trust = {"trust_remote_code": True}
processor = AutoProcessor.from_pretrained("saved", **trust)
model = AutoModelForCausalLM.from_pretrained("saved", **trust)
inputs = processor(images=[Image.open("image.png")], text=["<image>"], return_tensors="pt")
ids = model.generate(**processor(text=["red"], return_tensors="pt"), generation_mode="image", do_sample=False)
drawn = processor.decode_images(model.decode_image_tokens(ids))[0]
assert AutoImageProcessor.from_pretrained("saved", **trust).crop_size.width == 24
processor.save_pretrained("again")
assert not {"modeling_moma", "tokenization"} & set(sys.modules)
json.dump([processor.encode_images([Image.open("image.png")])[0], drawn.size], open("out.json", "w"))
"""
    result = run_python(["-c", WITHOUT_PACKAGES + code], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == [codes[0], [24, 16]]
    assert (tmp_path / "again" / "modeling_moma_vq.py").exists()


def test_page_shows_rectangles_in_their_shape(images):
    processor = library_processor("emu3", (16, 24))
    partial = PartialImages(processor)
    (shown,) = partial.decode([processor.encode_images(images)[0][:7]])
    pixels = np.asarray(shown)
    assert pixels.shape == (16, 24, 3)
    # six codes are the first row, the seventh begins the second
    assert not (pixels[:4] == PAPER).all() and not (pixels[4:8, :4] == PAPER).all()
    assert (pixels[4:8, 4:] == PAPER).all() and (pixels[8:] == PAPER).all()
    studio = DemoSession(tiny_model(processor, num_experts={"text": 2, "image": 2}), processor, "tiny")
    drawn = RoutingView(studio.model.config).image(studio.route(images[0], "red"), 0)
    assert drawn.size == (SIDE, round(SIDE * 16 / 24))


def whole_model(name):
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    if name == "janus":
        vision = JanusVisionConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=16
        )
        vision.mlp_ratio = 2
        model = JanusForConditionalGeneration(
            JanusConfig(text_config=LlamaConfig(**text, **heads), vision_config=vision, vq_config=JANUS)
        )
    else:
        words = {"<image>": 4, "<|extra_200|>": 5, **{f"<|visual token {code:06d}|>": 6 + code for code in range(24)}}
        config = Emu3Config(
            text_config=Emu3TextConfig(**text, **heads, pad_token_id=0), vq_config=EMU3, vocabulary_map=words
        )
        model = Emu3ForConditionalGeneration(config)
    return model


@pytest.mark.parametrize("name", ["janus", "emu3"])
def test_image_tokenizer_is_read_out_of_the_whole_model(name, tmp_path):
    torch.manual_seed(1)
    model = whole_model(name)
    model.save_pretrained(tmp_path / "whole")
    found = open_image_tokenizer(str(tmp_path / "whole"))
    expected = model.model.vqmodel.state_dict()
    assert type(found) is type(model.model.vqmodel) and number_of_codes(found.config) == 24
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    # one whose weights are not there would be random
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="`--image-tokenizer`.*weights of .*VQVAE are missing"):
        open_image_tokenizer(str(tmp_path / "bare"))


def test_others_are_refused_by_name(tmp_path):
    tokenizer = add_image_tokens(train_text_tokenizer(TEXTS * 3, vocab_size=300), 24)
    chameleon = ChameleonVQVAE(
        ChameleonVQVAEConfig(embed_dim=4, num_embeddings=24, latent_channels=8, base_channels=32, resolution=16)
    )
    siglip = SiglipVisionModel(
        SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    square = MomaImageProcessor.for_resolution(16)
    with pytest.raises(TypeError, match="ChameleonVQVAE has no decoder in Transformers: `moma convert`"):
        MomaProcessor(square, tokenizer, chameleon)
    with pytest.raises(TypeError, match="SiglipVisionModel gives no codes .* one of MomaVQModel, JanusVQVAE, Emu3VQ"):
        MomaProcessor(square, tokenizer, siglip)
    with pytest.raises(TypeError, match="JanusForConditionalGeneration is a whole model: .* `model.model.vqmodel`"):
        MomaProcessor(square, tokenizer, whole_model("janus"))
    siglip.save_pretrained(tmp_path / "siglip")
    with pytest.raises(ValueError, match="type 'siglip_vision_model', not of an image tokenizer: it gives no codes"):
        open_image_tokenizer(str(tmp_path / "siglip"))
    chameleon.save_pretrained(tmp_path / "chameleon")
    with pytest.raises(ValueError, match="'chameleon_vqgan', not .*: it has no decoder .* `moma convert` makes"):
        open_image_tokenizer(str(tmp_path / "chameleon"))
    with pytest.raises(ValueError, match="images of 16x18 pixels .* JanusVQVAE: .* multiples of 4"):
        MomaProcessor(MomaImageProcessor.for_resolution((16, 18)), tokenizer, library_model("janus"))
    with pytest.raises(ValueError, match=r"image_processor: .* crop of \(16, 24\) do not fit .* resolution 16"):
        MomaProcessor(MomaImageProcessor.for_resolution((16, 24)), add_image_tokens(tokenizer, 24), tiny_vq_model())
    other = add_image_tokens(train_text_tokenizer(TEXTS * 3, vocab_size=300), 25)
    with pytest.raises(ValueError, match="24"):
        MomaProcessor(square, other, library_model("emu3"))


def test_codes_and_sizes_that_do_not_fit_are_refused():
    tokenizer = library_processor("emu3", (16, 24)).vq_model
    with pytest.raises(ValueError, match=r"shape \(batch_size, 3, 16, 24\), got \(1, 3, 24, 16\)"):
        tokenizer.get_image_tokens(torch.zeros(1, 3, 24, 16))
    with pytest.raises(TypeError, match="`model` is the Emu3VQVAE of Transformers: only a MomaVQModel is exported"):
        export_image_tokenizer(tokenizer, "nowhere")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with an image and its caption, and a recipe of it."""
    root = tmp_path_factory.mktemp("photos")
    (root / "photos").mkdir()
    Image.new("RGB", (30, 20), "red").save(root / "photos" / "0.png")
    (root / "photos" / "metadata.csv").write_text("file_name,caption\n0.png,red stripes\n")
    source = {"data": str(root / "photos"), "image": "image", "text": "caption"}
    recipe = {"sources": {"photos": source}, "data": {"sequence_length": 64}, "processor": {"vocab_size": 300}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.mark.parametrize("name", ["janus", "emu3"])
def test_commands_build_a_processor_of_its_codes(name, photos, images, tmp_path, capsys):
    model = library_model(name)
    model.save_pretrained(tmp_path / "vq")
    given = [str(photos / "recipe.yaml"), "--image-tokenizer", str(tmp_path / "vq")]
    output = ["--output", str(tmp_path / "processor")]
    if name == "emu3":
        with pytest.raises(ValueError, match="`processor.image_size` is needed: Emu3VQVAE takes images of any size"):
            build_processor.main([*given, *output])
        assert not (tmp_path / "processor").exists()
    build_processor.main([*given, *output, "--set", "processor.image_size=16x24"])
    assert "24 an image" in capsys.readouterr().out
    processor = MomaProcessor.from_pretrained(tmp_path / "processor")
    assert processor.encode_images(images) == library_processor(name, (16, 24)).encode_images(images)
    folders = ["--processor", str(tmp_path / "processor"), "--output", str(tmp_path / "tokens")]
    tokenize.main([given[0], *folders, "--processes", "1"])
    assert "| photos, train | 1 | 15 | 24 |" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["0", "16x", "16x16x16", "-4", "1.5"])
def test_sizes_that_are_none_are_refused(given, photos, tmp_path):
    library_model("emu3").save_pretrained(tmp_path / "vq")
    options = ["--image-tokenizer", str(tmp_path / "vq"), "--output", str(tmp_path / "processor")]
    with pytest.raises(ValueError, match="image_size.* = .* (is no size in pixels|must be an integer or a text)"):
        build_processor.main([str(photos / "recipe.yaml"), *options, "--set", f"processor.image_size={given}"])


def test_own_image_tokenizer_keeps_its_size(photos, tmp_path):
    tiny_vq_model().save_pretrained(tmp_path / "vq")
    options = ["--image-tokenizer", str(tmp_path / "vq"), "--output", str(tmp_path / "processor")]
    with pytest.raises(ValueError, match=r"crop of \(32, 32\) do not fit the VQ model's resolution 16"):
        build_processor.main([str(photos / "recipe.yaml"), *options, "--set", "processor.image_size=32"])
    build_processor.main([str(photos / "recipe.yaml"), *options])
    assert isinstance(MomaProcessor.from_pretrained(tmp_path / "processor").vq_model, MomaVQModel)


@pytest.mark.parametrize("has_bos", [True, False])
def test_the_chat_template_begins_as_the_text_tokenizer_does(photos, tmp_path, has_bos):
    tiny_vq_model().save_pretrained(tmp_path / "vq")
    tokenizer = train_text_tokenizer(TEXTS * 3, vocab_size=300)
    if not has_bos:
        tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    tokenizer.save_pretrained(tmp_path / "text")
    options = ["--image-tokenizer", str(tmp_path / "vq"), "--set", f"processor.text_tokenizer={tmp_path / 'text'}"]
    build_processor.main([str(photos / "recipe.yaml"), *options, "--output", str(tmp_path / "processor")])
    processor = MomaProcessor.from_pretrained(tmp_path / "processor")
    chat = [{"role": "user", "content": "red stripes"}]
    asked = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert asked["input_ids"] == processor(text="red stripes")["input_ids"]
    assert (asked["input_ids"][0][0] == processor.tokenizer.bos_token_id) is has_bos


def test_a_recipe_says_whether_images_are_cropped_or_padded(photos, tmp_path):
    tiny_vq_model().save_pretrained(tmp_path / "vq")
    recipe, built = yaml.safe_load((photos / "recipe.yaml").read_text()), {}
    for do_pad in (False, True):
        recipe["processor"]["do_pad"] = do_pad
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        output = str(tmp_path / f"processor-{do_pad}")
        build_processor.main(
            [str(tmp_path / "recipe.yaml"), "--image-tokenizer", str(tmp_path / "vq"), "--output", output]
        )
        built[do_pad] = MomaProcessor.from_pretrained(output)
    # black at its ends, which a crop to the middle loses
    wide, square = Image.new("RGB", (96, 48), "white"), Image.new("RGB", (96, 96), "white")
    for image, top in ((wide, 20), (square, 44)):
        image.paste("black", (0, top, 20, top + 8))
    cropped, padded = (processor.encode_images([wide, square]) for processor in built.values())
    assert padded[0] == padded[1] == cropped[1] != cropped[0]
    # tokens of one are not for the other
    assert processor_fingerprint(built[False]) != processor_fingerprint(built[True])
