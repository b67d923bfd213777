# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from helpers.text_sources import edit_config
from modeling_moma import MomaConfig, MomaForCausalLM
from modeling_moma.cli.convert import main
from modeling_moma.convert.chameleon import (
    ImageVocabulary,
    config_from_chameleon,
    convert_chameleon,
    convert_tokenizer,
    read_config,
)
from modeling_moma.convert.reading import CheckpointError
from tokenization import MomaProcessor, MomaVQConfig, MomaVQModel


BEGIN, END, PLACEHOLDER, TURN, OFFSET, CODES = 21, 20, 22, 23, 4, 16
SIDE, IMAGE_LENGTH, VOCAB = 8, 16, 24 + 256
VQ = {
    "embed_dim": 8,
    "num_embeddings": CODES,
    "latent_channels": 12,
    "resolution": SIDE,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
}
PLAIN = {"swin_norm": False, "num_key_value_heads": 4, "model_parallel_size": 1}
SOURCES = {
    "7b": PLAIN,
    "34b": {"swin_norm": True, "num_key_value_heads": 2, "model_parallel_size": 2},
    "swin": {**PLAIN, "swin_norm": True},
    "grouped": {**PLAIN, "num_key_value_heads": 2, "attention_bias": True},
    "tied": {**PLAIN, "tie_word_embeddings": True, "model_parallel_size": 2},
    "scaled rope": {**PLAIN, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
}


def code_name(code):
    return f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z"


def vocabulary_map(ids=None):
    """Image ids in an order of their own, as in the released vocabulary."""
    codes = np.random.default_rng(1).permutation(CODES).tolist()
    ids = ids or range(OFFSET, OFFSET + CODES)
    frame = {"<eoss>": END, "<racm3:break>": BEGIN, "<image>": PLACEHOLDER, "<reserved08706>": TURN}
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    return {**special, **{code_name(code): token_id for code, token_id in zip(codes, ids)}, **frame}


def source_model(**fields):
    """A small Chameleon whose parameters, norms included, are all random, and whose codes are all in use."""
    config = ChameleonConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        **{"vocabulary_map": vocabulary_map(), "vq_config": VQ, **fields},
    )
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration(config).eval()
    shards = config.model_parallel_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if is_norm else 0.0))
            if ("q_norm" in name or "k_norm" in name) and shards > 1:
                # all heads of a shard were trained with one affine
                parameter.copy_(parameter[:shards].repeat_interleave(parameter.shape[0] // shards, dim=0))
        vq = model.model.vqmodel
        latents = vq.quant_conv(vq.encoder(torch.rand(8, 3, SIDE, SIDE) * 2 - 1)).permute(0, 2, 3, 1).flatten(0, 2)
        vq.quantize.embedding.weight.copy_(latents[: 8 * CODES : 8])
    return model


def save_tokenizer(folder, codes_are_special=False):
    names = {
        **vocabulary_map(),
        **{byte: 24 + n for n, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
    }
    backend = Tokenizer(models.BPE(vocab=names, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<eoss>", "<racm3:break>", "<image>", "<reserved08706>"]
    special += [name for name in names if name.startswith("IMGIMG")] if codes_are_special else []
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        sep_token="<reserved08706>",
        padding_side="left",
    )
    tokenizer.save_pretrained(folder)


def save_source(model, folder, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        save_tokenizer(folder)
        crop = {"height": SIDE, "width": SIDE}
        ChameleonImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder)
    return folder


def rewrite(folder, **changes):
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def mixed_batch():
    """A row of text, and a row with an image, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(24, VOCAB, (30,), generator=generator)
    codes = torch.randint(OFFSET, OFFSET + CODES, (IMAGE_LENGTH,), generator=generator)
    image = torch.cat([torch.tensor([1] * 6 + [0, BEGIN]), codes, torch.tensor([END]), text[:5]])
    attention_mask = torch.ones(2, 30, dtype=torch.long)
    attention_mask[1, :6] = 0
    return {"input_ids": torch.stack([text, image]), "attention_mask": attention_mask}


@torch.no_grad()
def bare_logits(model, **inputs):
    """Logits before the source masks those of images."""
    return model.lm_head(model.model(**inputs).last_hidden_state)


@pytest.fixture(scope="module", params=list(SOURCES))
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    source = source_model(**SOURCES[request.param])
    save_source(source, folder / "source", tokenizer=False)
    receipt = convert_chameleon(folder / "source", folder / "moma")
    return source, MomaForCausalLM.from_pretrained(folder / "moma").eval(), receipt


def test_logits_of_text_and_images_equal_the_sources(pair):
    source, converted, receipt = pair
    batch = mixed_batch()
    real = batch["attention_mask"].bool()
    expected, found = bare_logits(source, **batch)[real], bare_logits(converted, **batch)[real]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert receipt.relative_difference < 1e-5


def test_generates_the_sources_tokens(pair):
    source, converted, _ = pair
    arguments = {**mixed_batch(), "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 1, "do_sample": False}
    # MoMa's text mode also forbids the tokens around an image
    expected = source.generate(**arguments, suppress_tokens=[BEGIN, END])
    assert len(set(expected[:, 30:].flatten().tolist())) > 2
    assert torch.equal(converted.generate(**arguments, generation_mode="text"), expected)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    source = save_source(source_model(**SOURCES["tied"]), tmp_path / "source", tokenizer=False)
    rewrite(source, **{"lm_head.weight": torch.ones(VOCAB, 32)})
    with pytest.raises(CheckpointError, match="'lm_head.weight' differs from the embedding"):
        convert_chameleon(source, tmp_path / "moma", probe=False)


def test_layout_follows_the_vocabulary_map(pair):
    source, converted, receipt = pair
    config = converted.config
    assert config.num_experts == {"text": 1, "image": 1}
    assert config.norm_placement == ("post" if source.config.swin_norm else "pre")
    # the released configurations say 1, which is the padding token
    assert (source.config.bos_token_id, config.bos_token_id) == (1, 0)
    assert (config.eos_token_id, config.pad_token_id) == (2, 1)
    assert (config.begin_image_token_id, config.end_image_token_id) == (BEGIN, END)
    assert config.modality_token_ranges == {"image": [[OFFSET, OFFSET + CODES]]}
    assert config.image_seq_length == IMAGE_LENGTH
    assert receipt.copied == 3 * config.num_hidden_layers and receipt.new == 0


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seven")
    model = source_model(**PLAIN)
    return model, save_source(model, folder / "source")


def copy_source(seven, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for path in seven[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def seven_converted(seven, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "moma"
    receipt = convert_chameleon(seven[1], folder)
    return folder, receipt


def test_processor_gives_the_sources_token_ids(seven, seven_converted):
    source, folder = seven
    processor = MomaProcessor.from_pretrained(seven_converted[0])
    pixels = torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9)) * 2 - 1
    expected = source.get_image_tokens(pixels)
    assert len(expected.unique()) > CODES // 2
    found = processor.vq_model.get_image_tokens(pixels) + processor.image_token_offset
    assert torch.equal(found, expected.long())

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 19, 3), dtype=np.uint8))
    source_pixels = ChameleonImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.image_processor(image, return_tensors="pt")["pixel_values"], source_pixels)
    ids = processor(text="a <image>", images=[image])["input_ids"][0]
    words = PreTrainedTokenizerFast.from_pretrained(folder)("a ")["input_ids"]
    assert ids == [*words, BEGIN, *source.get_image_tokens(source_pixels)[0].tolist(), END]


def test_processor_and_model_agree_on_the_layout(seven_converted):
    config = MomaForCausalLM.from_pretrained(seven_converted[0]).config
    processor = MomaProcessor.from_pretrained(seven_converted[0])
    layout = processor.token_layout()
    assert layout == {name: getattr(config, name) for name in layout}
    assert processor.tokenizer.sep_token_id == TURN and processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.model_max_length == config.max_position_embeddings


def test_words_keep_their_ids(seven, seven_converted):
    text = "A red apple,\n2 µm wide<reserved08706>"
    expected = PreTrainedTokenizerFast.from_pretrained(seven[1])(text)["input_ids"]
    processor = MomaProcessor.from_pretrained(seven_converted[0])
    assert processor(text=text)["input_ids"] == [expected]
    assert processor.tokenizer.decode(expected, skip_special_tokens=True) == text.removesuffix("<reserved08706>")


@pytest.mark.parametrize("codes_are_special", [False, True])
def test_image_tokens_are_written_in_texts_as_the_processor_names_them(tmp_path, codes_are_special):
    save_tokenizer(tmp_path, codes_are_special)
    tokenizer = convert_tokenizer(tmp_path, ImageVocabulary.from_map(vocabulary_map()))
    text = "<|begin_image|><|image_0|><|image_15|><|end_image|><image>"
    assert tokenizer(text)["input_ids"] == [0, BEGIN, OFFSET, OFFSET + 15, END, PLACEHOLDER]
    assert len(tokenizer) == VOCAB
    # the old name is text like any other
    assert not set(tokenizer(code_name(3))["input_ids"]) & set(range(OFFSET, OFFSET + CODES))
    assert tokenizer.decode([24, OFFSET, END], skip_special_tokens=True) == tokenizer.decode([24])


def test_without_a_decoder_no_image_can_be_shown(seven_converted):
    folder, receipt = seven_converted
    assert any("decoder missing" in reason for reason in receipt.ignored)
    assert "decoder missing" in (folder / "conversion.json").read_text()
    with pytest.raises(ValueError, match="no decoder"):
        MomaProcessor.from_pretrained(folder).decode_images([list(range(IMAGE_LENGTH))])


def original_tokenizer(source):
    """The tensors of a VQ-GAN with a decoder, whose encoder is the source's."""
    torch.manual_seed(7)
    tensors = {**MomaVQModel(MomaVQConfig(**VQ)).state_dict(), **source.model.vqmodel.state_dict()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_original_tokenizer_brings_its_decoder(seven, tmp_path):
    source, folder = seven
    tensors = original_tokenizer(source)
    torch.save({"state_dict": {**tensors, "loss.logvar": torch.zeros(1)}}, tmp_path / "vqgan.ckpt")
    with pytest.raises(CheckpointError, match="vqgan.ckpt.*--allow-pickle"):
        convert_chameleon(folder, tmp_path / "moma", vqgan=tmp_path / "vqgan.ckpt")
    assert not (tmp_path / "moma").exists()
    convert_chameleon(folder, tmp_path / "moma", vqgan=tmp_path / "vqgan.ckpt", allow_pickle=True)
    processor = MomaProcessor.from_pretrained(tmp_path / "moma")

    original = MomaVQModel(MomaVQConfig(**VQ)).eval()
    original.load_state_dict(tensors)
    pixels = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9)) * 2 - 1
    codes = processor.vq_model.get_image_tokens(pixels)
    assert torch.equal(codes + OFFSET, source.get_image_tokens(pixels).long())
    expected = original.decode_image_tokens(original.get_image_tokens(pixels))
    torch.testing.assert_close(processor.vq_model.decode_image_tokens(codes), expected)
    assert len(processor.decode_images(codes)) == 4


def test_decoder_within_the_checkpoint_is_taken(seven, tmp_path):
    source, _ = seven
    folder = copy_source(seven, tmp_path)
    tensors = original_tokenizer(source)
    decoder = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    rewrite(folder, **{f"model.vqmodel.{name}": tensor for name, tensor in decoder.items()})
    receipt = convert_chameleon(folder, tmp_path / "moma")
    assert not any("decoder missing" in reason for reason in receipt.ignored)
    vq_model = MomaVQModel.from_pretrained(tmp_path / "moma" / "vq_model")
    assert all(torch.equal(vq_model.state_dict()[name], tensor) for name, tensor in decoder.items())


def test_another_tokenizer_is_refused(seven, tmp_path):
    source, folder = seven
    tensors = original_tokenizer(source)
    tensors["encoder.conv_out.bias"] += 0.01
    save_file(tensors, tmp_path / "vqgan.safetensors")
    with pytest.raises(CheckpointError, match="'encoder.conv_out.bias' is missing or differs"):
        convert_chameleon(folder, tmp_path / "moma", vqgan=tmp_path / "vqgan.safetensors")
    assert not (tmp_path / "moma").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.self_attn.k_norm.bias": None}, "model.layers.1.self_attn.k_norm.bias"),
        ({"model.vqmodel.extra": torch.zeros(2)}, 'Unexpected key.*"extra"'),
        ({"model.layers.0.self_attn.q_norm.weight": torch.zeros(3, 8)}, "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_keys_that_do_not_fit_are_named(seven, tmp_path, changes, message):
    folder = copy_source(seven, tmp_path)
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        convert_chameleon(folder, tmp_path / "moma")
    assert not (tmp_path / "moma").exists()


def test_scattered_image_ids_convert_without_a_processor(tmp_path):
    ids = [*range(OFFSET, OFFSET + 8), *range(40, 48)]
    source = source_model(**PLAIN, vocabulary_map=vocabulary_map(ids))
    save_source(source, tmp_path / "source", tokenizer=False)
    receipt = convert_chameleon(tmp_path / "source", tmp_path / "moma")
    converted = MomaForCausalLM.from_pretrained(tmp_path / "moma").eval()
    assert converted.config.modality_token_ranges == {"image": [[4, 12], [40, 48]]}
    ids = torch.tensor([[0, 5, 11, 12, 40, 47, 48, 100]])
    torch.testing.assert_close(
        bare_logits(converted, input_ids=ids), bare_logits(source, input_ids=ids), atol=1e-4, rtol=0
    )
    assert any("left out" in reason for reason in receipt.ignored)
    assert not (tmp_path / "moma" / "vq_model").exists()


def test_parts_that_do_not_fit_together_leave_the_vq_model_alone(seven, tmp_path):
    folder = copy_source(seven, tmp_path)
    ChameleonImageProcessor(crop_size={"height": 2 * SIDE, "width": 2 * SIDE}).save_pretrained(folder)
    receipt = convert_chameleon(folder, tmp_path / "moma")
    assert any("without a processor" in reason for reason in receipt.ignored)
    assert (tmp_path / "moma" / "vq_model" / "model.safetensors").is_file()
    assert not (tmp_path / "moma" / "tokenizer.json").exists()


def test_ways_of_generating_are_kept(seven, tmp_path):
    folder = copy_source(seven, tmp_path)
    GenerationConfig(do_sample=True, top_p=0.9, bos_token_id=1, eos_token_id=[2, TURN]).save_pretrained(folder)
    convert_chameleon(folder, tmp_path / "moma")
    found = MomaForCausalLM.from_pretrained(tmp_path / "moma").generation_config
    assert (found.do_sample, found.top_p, found.eos_token_id) == (True, 0.9, [2, TURN])
    assert (found.bos_token_id, found.pad_token_id) == (0, 1)


def test_released_sizes_are_those_of_the_default_configuration():
    names = {code_name(code): 4 + code for code in range(8192)} | {"<eoss>": 8196, "<racm3:break>": 8197}
    special = {"<s>": 0, "<pad>": 1, "</s>": 2}
    source = read_config({"model_type": "chameleon", "vocabulary_map": {**names, **special}})
    config = config_from_chameleon(source, ImageVocabulary.from_map(source.vocabulary_map))
    default = MomaConfig()
    for name in ("vocab_size", "modality_token_ranges", "begin_image_token_id", "end_image_token_id"):
        assert getattr(config, name) == getattr(default, name)
    assert (config.image_seq_length, config.head_dim, config.num_hidden_layers) == (1024, 128, 32)


def test_another_precision_can_be_asked_for(seven, tmp_path, capsys):
    source, folder = seven
    arguments = ["chameleon", "--source", str(folder), "--output", str(tmp_path / "moma"), "--dtype", "bfloat16"]
    assert main(arguments) == 0
    converted = MomaForCausalLM.from_pretrained(tmp_path / "moma")
    assert converted.dtype == torch.bfloat16
    assert torch.equal(converted.lm_head.weight, source.lm_head.weight.bfloat16())
    receipt = json.loads((tmp_path / "moma" / "conversion.json").read_text())
    assert receipt["relative_difference"] < 1e-5 and receipt["new_token_probability"] is None
    assert MomaProcessor.from_pretrained(tmp_path / "moma").vq_model.dtype == torch.float32


TEMPLATE = "{% for message in messages %}{{ message['content'] }}<reserved08706>{% endfor %}"


def write_template_file(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_template_json(folder):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def write_template_setting(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": TEMPLATE}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": named}))


@pytest.mark.parametrize("write", [write_template_file, write_template_json, write_template_setting])
def test_chat_template_is_kept_and_takes_images_by_the_placeholder(write, seven, tmp_path):
    folder = copy_source(seven, tmp_path)
    write(folder)
    convert_chameleon(folder, tmp_path / "moma", probe=False)
    processor = MomaProcessor.from_pretrained(tmp_path / "moma")
    text = processor.apply_chat_template([{"role": "user", "content": "what? <image>"}])
    assert text == "what? <image><reserved08706>"
    ids = processor(text=text, images=[Image.new("RGB", (SIDE, SIDE))])["input_ids"][0]
    assert ids.count(BEGIN) == 1 and ids[-1] == TURN and len(ids) > IMAGE_LENGTH


FILES = ["tokenizer", "tokenizer_config", "special_tokens_map", "preprocessor_config", "generation_config"]


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_no_json_is_refused_by_name(name, seven, tmp_path):
    folder = copy_source(seven, tmp_path)
    (folder / f"{name}.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match=f"{name}.json: not a JSON file"):
        convert_chameleon(folder, tmp_path / "moma")
    assert not (tmp_path / "moma").exists()


def test_tokenizer_file_of_another_kind_is_refused_by_name(seven, tmp_path):
    folder = copy_source(seven, tmp_path)
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        convert_chameleon(folder, tmp_path / "moma")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type.*'llama'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"max_position_embeddings": IMAGE_LENGTH}, "image_seq_length"),
        ({"vocabulary_map": None}, "vocabulary_map"),
        ({"vocabulary_map": {"IMGIMGAXZ": 4}}, "IMGIMGAXZ"),
    ],
)
def test_configurations_that_cannot_be_converted_are_refused(seven, tmp_path, fields, message):
    folder = copy_source(seven, tmp_path)
    edit_config(folder, **fields)
    with pytest.raises(CheckpointError, match=message):
        convert_chameleon(folder, tmp_path / "moma")


def test_every_code_must_have_one_id():
    names = {code_name(code): 4 + code for code in range(3)}
    assert ImageVocabulary.from_map(names).codebook_order(3).tolist() == [0, 1, 2]
    with pytest.raises(CheckpointError, match="each of the 4 codes"):
        ImageVocabulary.from_map(names).codebook_order(4)


def test_an_id_that_is_no_number_is_named():
    with pytest.raises(CheckpointError, match="vocabulary_map: '<image>' has 'x', which is no id"):
        ImageVocabulary.from_map({**vocabulary_map(), "<image>": "x"})


@pytest.mark.parametrize("settings", [{"padding_side": "middle"}, {"bos_token": ["x"]}])
def test_settings_that_no_tokenizer_has_are_named(tmp_path, settings):
    save_tokenizer(tmp_path, False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="no tokenizer can be made of its .*tokenizer_config.json: "):
        convert_tokenizer(tmp_path, ImageVocabulary.from_map(vocabulary_map()))
