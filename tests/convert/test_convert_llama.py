# SPDX-License-Identifier: Apache-2.0
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from helpers.text_sources import CONFIGS, Q_PROJ, SIZES, assert_nothing_written, edit_tensors, save_source
from modeling_moma import MomaForCausalLM
from modeling_moma.convert.llama import convert_llama
from modeling_moma.convert.reading import CheckpointError
from tokenization import MomaProcessor


# config.json as in releases of the time before `rope_parameters`, such as Qwen2-0.5B's
OLD_FIELDS = {
    "qwen2-released": {
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": 24,
        "torch_dtype": "float32",
    }
}


def write_old_fields(folder: Path, fields):
    """Gives a folder the config.json of an old release, and returns its model as Transformers reads it."""
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "dtype"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config | fields))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request, tmp_path_factory, tokenizer, processor_folder):
    folder = tmp_path_factory.mktemp(request.param)
    source = save_source(folder / "source", CONFIGS[request.param], tokenizer, max_shard_size="20KB")
    if request.param in OLD_FIELDS:
        source = write_old_fields(folder / "source", OLD_FIELDS[request.param])
    receipt = convert_llama(folder / "source", folder / "moma", processor=processor_folder, max_shard_size="30KB")
    model, report = MomaForCausalLM.from_pretrained(folder / "moma", output_loading_info=True)
    assert not any(report.values())
    return source, model.eval(), receipt, len(tokenizer)


def padded_batch(num_ids: int):
    generator = torch.Generator().manual_seed(1)
    attention_mask = torch.ones(2, 24, dtype=torch.long)
    attention_mask[0, :9] = 0
    return {"input_ids": torch.randint(num_ids, (2, 24), generator=generator), "attention_mask": attention_mask}


def test_text_logits_equal_the_source(pair):
    source, model, receipt, num_ids = pair
    batch = padded_batch(num_ids)
    is_token = batch["attention_mask"].bool()
    with torch.no_grad():
        expected, logits = (part(**batch).logits[is_token][:, :num_ids] for part in (source, model))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert receipt.relative_difference < 1e-5


def test_greedy_generation_equals_the_source_token_for_token(pair):
    source, model, _, num_ids = pair
    arguments = {**padded_batch(num_ids), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    # the source's rows of no token become new tokens, from which text mode keeps a model
    expected = source.generate(**arguments, suppress_tokens=list(range(num_ids, source.config.vocab_size)))
    assert torch.equal(model.generate(**arguments), expected)
    assert len(set(expected[:, 24:].flatten().tolist())) > 2


def test_receipt_says_what_probability_new_tokens_take(pair):
    _, model, receipt, _ = pair
    # the library's class for Qwen2 adds tokens of its own; what comes after them is placeholder, begin, end, codes
    num_ids = model.config.modality_token_ranges["image"][0][0] - 3
    ids = torch.randint(num_ids, (2, 16), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :5] = 0
    with torch.no_grad():
        logits = model(ids, attention_mask=attention_mask).logits
        probabilities = logits[attention_mask.bool()].softmax(dim=-1)
    share = float(probabilities[:, num_ids:].sum(dim=-1).mean())
    assert receipt.new_token_probability == pytest.approx(share, rel=1e-3)
    # random models are as undecided about words as about codes
    assert 0 < receipt.new_token_probability < 0.5
    assert f"probability of new tokens   {receipt.new_token_probability:.2%}" in receipt.table()


def test_receipt_counts_every_key(pair):
    source, model, receipt, _ = pair
    num_keys = len(model.state_dict()) - model.config.tie_word_embeddings
    num_source = len(source.state_dict()) - model.config.tie_word_embeddings
    layers = model.config.num_hidden_layers
    assert (receipt.taken, receipt.copied) == (num_source, 3 * layers)
    assert receipt.new == (layers if source.config.model_type == "qwen2" else 0)
    assert receipt.taken + receipt.copied + receipt.new == num_keys


def test_old_rows_stay_and_new_rows_lie_around_their_mean(source, convert, tokenizer, tmp_path):
    convert(source, code_rows="mean")
    model = MomaForCausalLM.from_pretrained(tmp_path / "moma")
    original = AutoModelForCausalLM.from_pretrained(source)
    new_ids = torch.arange(len(tokenizer), model.config.vocab_size)
    assert len(new_ids) == 35
    images = slice(*model.config.modality_token_ranges["image"][0])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        kept, rows = original.state_dict()[name][: len(tokenizer)], model.state_dict()[name]
        deviation = (rows[new_ids] - kept.mean(dim=0)) / kept.std(dim=0)
        assert 0.09 < deviation.std() < 0.11
        assert torch.pdist(rows[images]).min() > 0


def test_rows_beyond_the_tokenizer_stay_where_they_are(source, tmp_path, tokenizer, processor_folder):
    save_source(source, LlamaConfig(**{**SIZES, "vocab_size": 512}), tokenizer)
    convert_llama(source, tmp_path / "moma", processor=processor_folder)
    model = MomaForCausalLM.from_pretrained(tmp_path / "moma")
    first_unused = len(tokenizer) + 35
    assert model.config.vocab_size == 512
    assert model.config.modality_token_ranges == {"image": [[len(tokenizer) + 3, first_unused]]}
    expected = AutoModelForCausalLM.from_pretrained(source).model.embed_tokens.weight[first_unused:]
    assert torch.equal(model.model.embed_tokens.weight[first_unused:], expected)


@pytest.mark.parametrize("image_group", ["copy", "new"])
def test_image_group_is_a_copy_or_new(image_group, source, convert, tmp_path):
    receipt = convert(source, image_group=image_group)
    tensors = MomaForCausalLM.from_pretrained(tmp_path / "moma").state_dict()
    text = [name for name in tensors if ".groups.text." in name]
    same = [torch.equal(tensors[name], tensors[name.replace(".text.", ".image.")]) for name in text]
    assert len(text) == 6
    assert all(same) if image_group == "copy" else not any(same)
    assert (receipt.copied, receipt.new) == ((6, 0) if image_group == "copy" else (0, 6))


def test_codes_begin_near_a_uniform_loss_and_old_rows_stay(pair):
    source, model, receipt, num_ids = pair
    # a guess among 32 codes is 3.5 nats; random small models leave no room to tell words from images well
    assert receipt.image_loss < math.log(32) + 2.5
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(model.state_dict()[name][:num_ids], source.state_dict()[name][:num_ids])
    images = slice(*model.config.modality_token_ranges["image"][0])
    assert torch.pdist(model.get_input_embeddings().weight[images]).min() > 0


def test_fitted_rows_begin_lower_than_those_of_the_mean(source, tmp_path, processor_folder):
    losses = {
        rows: convert_llama(source, tmp_path / rows, processor=processor_folder, code_rows=rows).image_loss
        for rows in ("mean", "fitted")
    }
    assert losses["fitted"] < losses["mean"] - 0.5
    with pytest.raises(ValueError, match="`code_rows` must be one of .*'best'"):
        convert_llama(source, tmp_path / "other", processor=processor_folder, code_rows="best")


def test_converted_model_writes_images_also_where_one_token_begins_ends_and_pads(source, convert, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(source)
    convert(source)
    model = MomaForCausalLM.from_pretrained(tmp_path / "moma")
    processor = MomaProcessor.from_pretrained(tmp_path / "moma")
    assert model.config.pad_token_id == model.config.bos_token_id == model.config.eos_token_id == 2
    inputs = processor(text=["noto: red apple", "castle"], padding=True, return_tensors="pt")
    ids = model.generate(**inputs, generation_mode="image", do_sample=False)
    assert len(processor.decode_images(model.decode_image_tokens(ids))) == 2


def test_generation_settings_of_a_chat_model_stay(source, convert, tmp_path):
    GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[7, 9], bos_token_id=1).save_pretrained(source)
    convert(source)
    config = GenerationConfig.from_pretrained(tmp_path / "moma")
    assert (config.do_sample, config.temperature) == (True, 0.6)
    assert config.eos_token_id == [7, 9, 2]
    assert config.pad_token_id == 0


def test_half_precision_stays_bit_by_bit(tmp_path, tokenizer, convert):
    original = save_source(tmp_path / "source", CONFIGS["qwen3"], tokenizer, dtype=torch.bfloat16).state_dict()
    assert convert(tmp_path / "source").relative_difference < 1e-5
    model = MomaForCausalLM.from_pretrained(tmp_path / "moma")
    assert model.dtype == torch.bfloat16 and torch.equal(model.state_dict()[Q_PROJ], original[Q_PROJ])


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_type_that_no_model_is_written_in_is_refused(dtype, source, convert, tmp_path):
    with pytest.raises(CheckpointError, match="`dtype` = .*must be one of .*torch.bfloat16"):
        convert(source, dtype=dtype)
    assert_nothing_written(tmp_path)


def test_same_seed_gives_the_same_file(source, tmp_path, processor_folder):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        arguments = {"processor": processor_folder, "seed": seed, "image_group": "new", "probe": False}
        assert convert_llama(source, tmp_path / name, **arguments).relative_difference is None
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_probe_allows_for_the_rounding_that_was_asked_for_and_still_finds_faults(source, convert, tmp_path):
    assert convert(source, dtype=torch.bfloat16).relative_difference < 1e-5
    model = MomaForCausalLM.from_pretrained(tmp_path / "moma")
    assert model.dtype == torch.bfloat16
    original = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(model.state_dict()[Q_PROJ], original.state_dict()[Q_PROJ].bfloat16())
    edit_tensors(source, Q_PROJ, lambda tensors, key: tensors[key].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="probe batch"):
        convert_llama(source, tmp_path / "other", processor=tmp_path / "moma", dtype=torch.bfloat16)
