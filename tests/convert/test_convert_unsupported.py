# SPDX-License-Identifier: Apache-2.0
import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.sounds import processor_of_sounds
from helpers.text_sources import CONFIGS, assert_nothing_written, edit_config, save_source
from modeling_moma.cli.convert import main
from modeling_moma.convert.llama import convert_llama
from modeling_moma.convert.reading import CheckpointError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "smollm3"}, "smollm3.*rotary"),
        ({"model_type": "gemma2"}, "model_type.*gemma2"),
        ({"model_type": "gemma3_text"}, "gemma3_text.*both before and after.*scaled.*`sliding_window`"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe.*softmax over all experts.*layers without experts"),
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
        ({"num_attention_heads": 0}, ""),
        ({"vocab_size": 0}, "vocab_size = 0"),
    ],
)
def test_feature_that_moma_cannot_express_is_refused_by_field(fields, message, source, convert, tmp_path):
    edit_config(source, **fields)
    with pytest.raises(CheckpointError, match=f"config.json.*{message}"):
        convert(source)
    assert_nothing_written(tmp_path)


def test_codecs_that_would_be_dropped_are_refused(source, tmp_path):
    processor_of_sounds().save_pretrained(tmp_path / "sounds")
    with pytest.raises(CheckpointError, match="--processor .*sounds' has codecs of audio"):
        convert_llama(source, tmp_path / "moma", processor=tmp_path / "sounds")
    assert_nothing_written(tmp_path)


def test_a_tokenizer_of_another_version_is_named(source, convert, tmp_path):
    path = source / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": {"type": "of tomorrow"}}))
    with pytest.raises(CheckpointError, match="tokenizer.json: this tokenizer cannot be given image tokens"):
        convert(source)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("size", ["0GB", "much"])
def test_a_shard_of_no_size_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        main(["llama", "--source", "nowhere", "--processor", "p", "--output", "o", f"--max-shard-size={size}"])
    assert f"--max-shard-size = {size!r} must be a size" in capsys.readouterr().err


def test_pickle_is_refused_unless_allowed(source, convert, tmp_path):
    tensors = AutoModelForCausalLM.from_pretrained(source).state_dict()
    for path in source.glob("model*"):
        path.unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*--allow-pickle"):
        convert(source)
    assert_nothing_written(tmp_path)
    assert convert(source, allow_pickle=True).relative_difference < 1e-5


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


def test_command_prints_the_receipt_or_one_line_of_error(source, tmp_path, processor_folder, capsys):
    arguments = ["llama", "--source", str(source), "--output", str(tmp_path / "moma")]
    arguments += ["--processor", str(processor_folder)]
    assert main(arguments) == 0
    assert "keys copied" in capsys.readouterr().out
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("moma convert: ")


@pytest.mark.parametrize("text", ['{"do_sample": ', "[]", '{"temperature": "hot"}'])
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
