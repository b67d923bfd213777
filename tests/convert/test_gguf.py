# SPDX-License-Identifier: Apache-2.0
"""Tensors of small GGUF files, read a few rows at a time."""

import numpy as np
import pytest

from modeling_moma.convert import gguf as reading


gguf = pytest.importorskip("gguf", reason="`pip install 'modeling-moma[gguf]'` is missing")


def write_file(path, tensors, quantization):
    """A Llama of which only the given tensors are there."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    for name, values in tensors.items():
        writer.add_tensor(name, gguf.quantize(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_vectors_and_matrices_are_whole_however_many_rows_are_read_at_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reading, "ROWS_AT_ONCE", 8)
    quantization = gguf.GGMLQuantizationType[name]
    random = np.random.default_rng(0)
    tensors = {"token_embd.weight": random.normal(size=(64, 64)), "output_norm.weight": random.normal(size=64)}
    tensors = {key: values.astype(np.float32) for key, values in tensors.items()}
    write_file(tmp_path / "model.gguf", tensors, quantization)
    reader = reading.GgufReader(tmp_path, "model.gguf")
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for key, values in tensors.items():
        expected = gguf.dequantize(gguf.quantize(values, quantization), quantization)
        np.testing.assert_array_equal(reader[names[key]].numpy(), expected)
