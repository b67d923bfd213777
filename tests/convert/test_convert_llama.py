# SPDX-License-Identifier: Apache-2.0
import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LogitsProcessor,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from helpers.tiny import TEXTS, noise_pictures, tiny_processor
from modeling_moma import MomaForCausalLM
from modeling_moma.cli.convert import main
from modeling_moma.convert.llama import convert_llama
from modeling_moma.convert.probe import new_token_probability, text_batch
from modeling_moma.convert.reading import CheckpointError
from modeling_moma.data.segments import read_messages
from modeling_moma.data.sources import read_sources
from tokenization import MomaProcessor, train_text_tokenizer
from tokenization.chat_template_moma import with_picture_parts


ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama-wide-heads": LlamaConfig(**SIZES, head_dim=12, attention_bias=True),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, hidden_act="gelu"),
    "llama-yarn": LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
    "qwen2": Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2-released": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3-biased": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}
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


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is <image>? "},
    {"role": "assistant", "content": "A place\nfor a picture."},
]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INDENTED = "  {% for message in messages %}\n    {{ message.content }}\n  {% endfor %}\nend"
NEWLINE_FIRST = "\n\n {{ messages | length }}\n{%- for message in messages %}\n{{ message.content }}{% endfor %}"


class FirstIds(LogitsProcessor):
    """Leaves ids below a limit, so that draws from vocabularies of different sizes are the same."""

    def __init__(self, limit: int):
        self.limit = limit

    def __call__(self, input_ids, scores):
        return scores[:, : self.limit]


@pytest.fixture(scope="module")
def processor_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_text_tokenizer(TEXTS * 3, vocab_size=300)


def write_old_fields(folder: Path, fields):
    """Gives a folder the config.json of an old release, and returns its model as Transformers reads it."""
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "dtype"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config | fields))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def save_source(folder: Path, config, tokenizer, dtype=torch.float32, **kwargs):
    """A random text model with its tokenizer; large weights, so that differences would show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float(name.endswith("norm.weight")), std=0.2)
    model.to(dtype).save_pretrained(folder, **kwargs)
    tokenizer.save_pretrained(folder)
    return model


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


@pytest.mark.parametrize("generate", [MomaForCausalLM.generate, GenerationMixin.generate], ids=["text-mode", "stock"])
def test_greedy_generation_equals_the_source_token_for_token(generate, pair):
    source, model, _, num_ids = pair
    arguments = {**padded_batch(num_ids), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    # the source's rows of no token become new tokens, from which text mode keeps a model and the stock loop does not
    expected = source.generate(**arguments, suppress_tokens=list(range(num_ids, source.config.vocab_size)))
    if generate is GenerationMixin.generate:
        arguments["suppress_tokens"] = list(range(num_ids, model.config.vocab_size))
    assert torch.equal(generate(model, **arguments), expected)
    assert len(set(expected[:, 24:].flatten().tolist())) > 2


def test_receipt_says_what_probability_new_tokens_take(pair):
    source, model, receipt, num_ids = pair
    # the library's class for Qwen2 adds tokens of its own; what comes after them is placeholder, begin, end, codes
    num_ids = model.config.modality_token_ranges["image"][0][0] - 3
    batch = text_batch(list(range(num_ids)))
    with torch.no_grad():
        probabilities = model(**batch).logits[batch["attention_mask"].bool()].softmax(dim=-1)
    share = float(probabilities[:, num_ids:].sum(dim=-1).mean())
    assert receipt.new_token_probability == pytest.approx(share, rel=1e-3)
    # random models are as undecided about words as about codes
    assert 0 < receipt.new_token_probability < 0.5
    assert f"probability of new tokens   {receipt.new_token_probability:.2%}" in receipt.table()


def test_probability_of_new_tokens_is_the_mean_of_their_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [3.0, 0.0, 0.0, 0.0]])
    exponents = logits.exp()
    expected = (exponents[:, [1, 3]].sum(dim=1) / exponents.sum(dim=1)).mean()
    assert new_token_probability(logits, [1, 3]) == pytest.approx(float(expected))


def test_sampled_generation_equals_the_source_token_for_token(pair):
    source, model, _, num_ids = pair
    generated = []
    for part in (source, model):
        torch.manual_seed(3)
        # the stock loop, as the grammar of pictures needs the whole vocabulary
        ids = GenerationMixin.generate(
            part,
            **padded_batch(num_ids),
            max_new_tokens=24,
            do_sample=True,
            temperature=0.7,
            top_k=20,
            pad_token_id=0,
            logits_processor=[FirstIds(num_ids)],
        )
        generated.append(ids)
    assert torch.equal(*generated)
    assert generated[0].shape[1] > 24


def test_receipt_counts_every_key(pair, tmp_path):
    source, model, receipt, _ = pair
    num_keys = len(model.state_dict()) - model.config.tie_word_embeddings
    num_source = len(source.state_dict()) - model.config.tie_word_embeddings
    layers = model.config.num_hidden_layers
    assert (receipt.taken, receipt.copied) == (num_source, 3 * layers)
    assert receipt.new == (layers if source.config.model_type == "qwen2" else 0)
    assert receipt.taken + receipt.copied + receipt.new == num_keys
    receipt.save(tmp_path)
    assert json.loads((tmp_path / "conversion.json").read_text()) == dataclasses.asdict(receipt)


@pytest.fixture
def source(tmp_path, tokenizer):
    folder = tmp_path / "source"
    save_source(folder, CONFIGS["llama"], tokenizer, max_shard_size="20KB")
    return folder


@pytest.fixture
def convert(tmp_path, processor_folder):
    def run(source, **kwargs):
        return convert_llama(source, tmp_path / "moma", processor=processor_folder, **kwargs)

    return run


def assert_nothing_written(folder: Path, name="moma"):
    assert not [path for path in folder.iterdir() if name in path.name]


def edit_config(source: Path, **fields):
    config = json.loads((source / "config.json").read_text()) | fields
    (source / "config.json").write_text(json.dumps(config))


def edit_tensors(source: Path, key: str, edit):
    """Applies `edit(tensors, key)` to the shard that holds a key."""
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shard = source / index["weight_map"][key]
    tensors = load_file(shard)
    edit(tensors, key)
    save_file(tensors, shard)
    index["weight_map"] = {name: place for name, place in index["weight_map"].items() if place != shard.name}
    index["weight_map"] |= dict.fromkeys(tensors, shard.name)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def test_old_rows_stay_and_new_rows_lie_around_their_mean(source, convert, tokenizer, tmp_path):
    convert(source, code_rows="mean")
    model = MomaForCausalLM.from_pretrained(tmp_path / "moma")
    original = AutoModelForCausalLM.from_pretrained(source)
    new_ids = torch.arange(len(tokenizer), model.config.vocab_size)
    assert len(new_ids) == 35
    pictures = slice(*model.config.modality_token_ranges["image"][0])
    for old, rows in (
        (original.model.embed_tokens.weight, model.model.embed_tokens.weight),
        (original.lm_head.weight, model.lm_head.weight),
    ):
        kept = old[: len(tokenizer)]
        assert torch.equal(rows[: len(tokenizer)], kept)
        deviation = (rows[new_ids] - kept.mean(dim=0)) / kept.std(dim=0)
        assert 0.09 < deviation.std() < 0.11
        assert torch.pdist(rows[pictures]).min() > 0


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


def test_processor_beside_the_model_reads_text_as_the_source_did(source, convert, tmp_path):
    with_template = AutoTokenizer.from_pretrained(source)
    with_template.chat_template = CHATML
    with_template.save_pretrained(source)
    convert(source)
    processor = MomaProcessor.from_pretrained(tmp_path / "moma")
    expected = AutoTokenizer.from_pretrained(source)(TEXTS)["input_ids"]
    assert processor(text=TEXTS)["input_ids"] == expected
    for one in (processor, processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "moma")):
        assert one.apply_chat_template(CHAT, tokenize=False) == with_template.apply_chat_template(CHAT, tokenize=False)
    config = MomaForCausalLM.from_pretrained(tmp_path / "moma").config
    layout = processor.token_layout()
    assert {name: getattr(config, name) for name in layout} == layout
    assert processor.tokenizer.model_max_length == config.max_position_embeddings


PICTURE_CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Name it."}]},
    {"role": "assistant", "content": "red apple"},
]


@pytest.mark.parametrize("template", [CHATML, INDENTED, NEWLINE_FIRST], ids=["chatml", "indented", "newline-first"])
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:], [{"role": "user", "content": ""}]])
@pytest.mark.parametrize("prompt", [False, True])
def test_template_of_the_source_stays_for_texts_to_the_character(template, chat, prompt, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    expected = tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    changed = with_picture_parts(template)
    assert (
        tokenizer.apply_chat_template(chat, chat_template=changed, tokenize=False, add_generation_prompt=prompt)
        == expected
    )
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]
    assert (
        tokenizer.apply_chat_template(parts, chat_template=changed, tokenize=False, add_generation_prompt=prompt)
        == expected
    )
    assert with_picture_parts(changed) == changed


def test_template_of_the_source_takes_pictures_and_leaves_messages_without_content(tokenizer):
    changed = with_picture_parts(CHATML)
    text = tokenizer.apply_chat_template(PICTURE_CHAT, chat_template=changed, tokenize=False)
    assert "<|im_start|>user\n<image>Name it.<|im_end|>\n" in text
    calls = "{% for m in messages %}{{ m.role }} {{ m.content is none }} {{ m.tool_calls | default('') }};{% endfor %}"
    chat = [{"role": "assistant", "content": None, "tool_calls": ["add"]}, {"role": "user", "content": "x"}]
    expected = tokenizer.apply_chat_template(chat, chat_template=calls, tokenize=False)
    assert tokenizer.apply_chat_template(chat, chat_template=with_picture_parts(calls), tokenize=False) == expected
    audio = [{"role": "user", "content": [{"type": "audio"}]}]
    with pytest.raises(TemplateError, match="must be of type text or image, got audio"):
        tokenizer.apply_chat_template(audio, chat_template=changed, tokenize=False)


def test_picture_in_a_chat_becomes_its_codes(source, convert, tmp_path):
    with_template = AutoTokenizer.from_pretrained(source)
    with_template.chat_template = CHATML
    with_template.save_pretrained(source)
    convert(source)
    processor = MomaProcessor.from_pretrained(tmp_path / "moma")
    picture = noise_pictures(1)[0]
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Name it."}]}]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
    frame = processor.picture_ids(processor.encode_pictures([picture])[0])
    start = ids[0].index(frame[0])
    assert ids[0][start : start + len(frame)] == frame
    # what a training on chats makes of the same messages
    kind = read_sources({"chats": {"data": "nowhere", "messages": "messages"}})[0].kind
    row = {"messages": [*chat, {"role": "assistant", "content": "red apple"}]}
    text, pictures = read_messages(kind, row, processor)
    assert pictures == [picture] and text.count("<image>") == 1


def test_codes_begin_near_a_uniform_loss_and_old_rows_stay(pair):
    source, model, receipt, num_ids = pair
    # a guess among 32 codes is 3.5 nats; random small models leave no room to tell words from pictures well
    assert receipt.picture_loss < math.log(32) + 2.5
    for old, rows in (
        (source.get_input_embeddings().weight, model.get_input_embeddings().weight),
        (source.get_output_embeddings().weight, model.get_output_embeddings().weight),
    ):
        assert torch.equal(rows[:num_ids], old[:num_ids])
    pictures = slice(*model.config.modality_token_ranges["image"][0])
    assert torch.pdist(model.get_input_embeddings().weight[pictures]).min() > 0


def test_fitted_rows_begin_lower_than_those_of_the_mean(source, tmp_path, processor_folder):
    losses = {
        rows: convert_llama(source, tmp_path / rows, processor=processor_folder, code_rows=rows).picture_loss
        for rows in ("mean", "fitted")
    }
    assert losses["fitted"] < losses["mean"] - 0.5
    with pytest.raises(ValueError, match="`code_rows` must be one of .*'best'"):
        convert_llama(source, tmp_path / "other", processor=processor_folder, code_rows="best")


def test_converted_model_writes_pictures_also_where_one_token_begins_ends_and_pads(source, convert, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(source)
    convert(source)
    model = MomaForCausalLM.from_pretrained(tmp_path / "moma")
    processor = MomaProcessor.from_pretrained(tmp_path / "moma")
    assert model.config.pad_token_id == model.config.bos_token_id == model.config.eos_token_id == 2
    inputs = processor(text=["noto: red apple", "castle"], padding=True, return_tensors="pt")
    ids = model.generate(**inputs, generation_mode="image", do_sample=False)
    assert len(processor.decode_pictures(model.decode_image_tokens(ids))) == 2


def test_generation_settings_of_a_chat_model_stay(source, convert, tmp_path):
    GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[7, 9], bos_token_id=1).save_pretrained(source)
    convert(source)
    config = GenerationConfig.from_pretrained(tmp_path / "moma")
    assert (config.do_sample, config.temperature) == (True, 0.6)
    assert config.eos_token_id == [7, 9, 2]
    assert config.pad_token_id == 0


def test_half_precision_stays_bit_by_bit_unless_another_type_is_asked_for(tmp_path, tokenizer, processor_folder):
    original = save_source(tmp_path / "source", CONFIGS["qwen3"], tokenizer, dtype=torch.bfloat16).state_dict()
    for dtype in (None, torch.float32):
        folder = tmp_path / str(dtype)
        receipt = convert_llama(tmp_path / "source", folder, processor=processor_folder, dtype=dtype)
        assert receipt.relative_difference < 1e-5
        model = MomaForCausalLM.from_pretrained(folder)
        assert model.dtype == (dtype or torch.bfloat16)
        key = "model.layers.1.mlp.groups.image.mlp.down_proj.weight"
        assert torch.equal(model.state_dict()[key], original["model.layers.1.mlp.down_proj.weight"].to(model.dtype))


def test_same_seed_gives_the_same_file(source, tmp_path, processor_folder):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        convert_llama(source, tmp_path / name, processor=processor_folder, seed=seed, image_group="new", probe=False)
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "smollm3"}, "smollm3.*rotary"),
        ({"model_type": "gemma2"}, "model_type.*gemma2"),
        (
            {"model_type": "gemma3_text", "tie_word_embeddings": True},
            "gemma3_text.*both before and after.*times 5.66 at the input",
        ),
        (
            {"model_type": "gemma3", "text_config": {"sliding_window": 512, "final_logit_softcapping": 30.0}},
            "gemma3.*`sliding_window` = 512.*`final_logit_softcapping` = 30.0",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 2},
            "qwen3_moe.*softmax over 8 experts, of which the best 2 are kept, not scaled.*layers without experts",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts_per_tok": 1, "norm_topk_prob": True},
            "qwen3_moe.*a conversion of several experts has not been written",
        ),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window"),
        ({"model_type": "mistral"}, "sliding_window"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "sliding_window",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"max_position_embeddings": 16}, "image_seq_length"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_feature_that_moma_cannot_express_is_refused_by_field(fields, message, source, convert, tmp_path):
    edit_config(source, **fields)
    with pytest.raises(CheckpointError, match=f"config.json.*{message}"):
        convert(source)
    assert_nothing_written(tmp_path)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def drop(tensors, key):
    del tensors[key]


def add(tensors, key):
    tensors["model.layers.1.self_attn.sinks"] = torch.zeros(4)


def transpose(tensors, key):
    tensors[key] = tensors[key][:24].contiguous()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, rf"lacks the key '{Q_PROJ}', of the shape \(32, 32\)"),
        (add, r"model-.*safetensors: nothing takes the key 'model.layers.1.self_attn.sinks', of the shape \(4,\)"),
        (transpose, rf"model-.*safetensors: '{Q_PROJ}' has the shape \(24, 32\).*\(32, 32\)"),
    ],
)
def test_missing_extra_and_bent_keys_are_refused_by_name(edit, message, source, convert, tmp_path):
    edit_tensors(source, Q_PROJ, edit)
    with pytest.raises(CheckpointError, match=message):
        convert(source)
    assert_nothing_written(tmp_path)


def test_truncated_shard_is_refused_by_name(source, convert, tmp_path):
    shard = sorted(source.glob("model-00002-*"))[0]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=shard.name):
        convert(source)
    assert_nothing_written(tmp_path)


def test_missing_shard_is_refused_by_name(source, convert, tmp_path):
    shard = sorted(source.glob("model-00002-*"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        convert(source)
    assert_nothing_written(tmp_path)


def test_pickle_is_refused_unless_allowed(source, convert, tmp_path):
    tensors = AutoModelForCausalLM.from_pretrained(source).state_dict()
    for path in source.glob("model*"):
        path.unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*--allow-pickle"):
        convert(source)
    assert_nothing_written(tmp_path)
    assert convert(source, allow_pickle=True).relative_difference < 1e-5


def test_outputs_that_differ_fail_the_conversion(source, convert, tmp_path):
    edit_tensors(source, Q_PROJ, lambda tensors, key: tensors[key].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="probe batch"):
        convert(source)
    assert_nothing_written(tmp_path)
    assert convert(source, probe=False).relative_difference is None


def test_tied_head_that_differs_is_refused_and_an_equal_one_ignored(tmp_path, tokenizer, convert):
    source = tmp_path / "source"
    model = save_source(source, CONFIGS["llama-tied"], tokenizer)
    path = source / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": model.lm_head.weight.detach() + 1}, path)
    with pytest.raises(CheckpointError, match="'lm_head.weight' differs from the embedding"):
        convert(source)
    save_file(tensors | {"lm_head.weight": model.lm_head.weight.detach().clone()}, path)
    assert sum(convert(source).ignored.values()) == 1


def test_source_without_tokenizer_is_refused(source, convert, tmp_path):
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        convert(source)
    assert_nothing_written(tmp_path)


def test_output_that_exists_is_left_alone(source, convert, tmp_path):
    (tmp_path / "moma").mkdir()
    (tmp_path / "moma" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(source)
    assert [path.name for path in (tmp_path / "moma").iterdir()] == ["mine.txt"]


def test_command_prints_the_receipt_or_one_line_of_error(source, tmp_path, processor_folder, capsys):
    arguments = ["llama", "--source", str(source), "--output", str(tmp_path / "moma")]
    arguments += ["--processor", str(processor_folder)]
    assert main(arguments) == 0
    assert "keys copied" in capsys.readouterr().out
    assert main(arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("moma convert: ")


def test_kill_half_way_leaves_nothing_that_loads_and_a_second_run_succeeds(tmp_path, tokenizer, processor_folder):
    save_source(tmp_path / "source", LlamaConfig(**{**SIZES, "num_hidden_layers": 24}), tokenizer)
    command = [sys.executable, "-m", "modeling_moma", "convert", "llama", "--source", str(tmp_path / "source")]
    command += ["--processor", str(processor_folder), "--output", str(tmp_path / "moma"), "--max-shard-size", "20KB"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".moma.*.partial/model-00001-*")):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (aside,) = tmp_path.glob(".moma.*.partial")
    assert not (tmp_path / "moma").exists()
    with pytest.raises((OSError, ValueError)):
        MomaForCausalLM.from_pretrained(aside)

    convert_llama(tmp_path / "source", tmp_path / "moma", processor=processor_folder)
    assert MomaForCausalLM.from_pretrained(tmp_path / "moma").num_parameters() > 0
    assert not aside.exists()


def test_probe_allows_for_the_rounding_that_was_asked_for_and_still_finds_faults(source, convert, tmp_path):
    assert convert(source, dtype=torch.bfloat16).relative_difference < 1e-5
    model = MomaForCausalLM.from_pretrained(tmp_path / "moma")
    assert model.dtype == torch.bfloat16
    original = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(model.state_dict()[Q_PROJ], original.state_dict()[Q_PROJ].bfloat16())
    edit_tensors(source, Q_PROJ, lambda tensors, key: tensors[key].fill_(torch.nan))
    with pytest.raises(CheckpointError, match="probe batch"):
        convert_llama(source, tmp_path / "other", processor=tmp_path / "moma", dtype=torch.bfloat16)


@pytest.mark.parametrize("text", ['{"do_sample": ', "[]", '{"temperature": "hot"}', '{"max_new_tokens": "many"}'])
def test_bad_generation_settings_are_refused_by_file(text, source, convert, tmp_path):
    (source / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="generation_config.json"):
        convert(source)
    assert_nothing_written(tmp_path)


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece would read more")
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "SiglipTokenizer"])
def test_tokenizer_that_needs_another_library_is_refused_by_file(tokenizer_class, source, convert, tmp_path):
    for path in source.glob("tokenizer*"):
        path.unlink()
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    with pytest.raises(CheckpointError, match=r"source/tokenizer.model: .*tokenizer.json"):
        convert(source)
    assert_nothing_written(tmp_path)
