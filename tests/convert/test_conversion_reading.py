# SPDX-License-Identifier: Apache-2.0
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling_moma.convert.reading import CheckpointError, CheckpointReader, read_json, read_pickle


TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
    "c": torch.tensor(7),
    "d": torch.empty(0, 4),
    "e": torch.tensor([True, False, True]),
}


def save_single(folder: Path, tensors=TENSORS) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


def save_sharded(folder: Path, shards=(("a", "b"), ("c", "d", "e")), suffix="safetensors", stem="model") -> Path:
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        shard = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        tensors = {name: TENSORS[name] for name in names}
        if suffix == "safetensors":
            save_file(tensors, folder / shard)
        else:
            torch.save(tensors, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    write_index(folder, weight_map, f"{stem}.{suffix}.index.json")
    return folder


def write_index(folder: Path, weight_map: dict, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("save", [save_single, save_sharded])
def test_every_tensor_is_read_as_it_was_saved(save, tmp_path):
    reader = CheckpointReader(save(tmp_path))
    assert set(reader) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert reader.names[name].shape == tuple(tensor.shape)
        assert reader.names[name].dtype == reader[name].dtype == tensor.dtype
        assert torch.equal(reader[name], tensor)


def test_huge_file_is_opened_without_reading_its_data(tmp_path):
    end = 1 << 36
    header = {
        "big": {"dtype": "F32", "shape": [end // 4096, 1024], "data_offsets": [0, end]},
        "small": {"dtype": "F32", "shape": [2, 1024], "data_offsets": [end, end + 8192]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end + 8192)
    reader = CheckpointReader(tmp_path)
    assert reader.names["big"].shape == (end // 4096, 1024)
    assert reader["small"].shape == (2, 1024)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_files_stay_neither_open_nor_mapped(tmp_path):
    reader = CheckpointReader(save_single(tmp_path))
    kept = reader["a"]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    descriptors = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not [path for path in descriptors if str(tmp_path) in path]
    assert torch.equal(kept, TENSORS["a"])


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_truncated_shard_is_refused_by_name(cut, tmp_path):
    save_sharded(tmp_path)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    os.truncate(shard, max(shard.stat().st_size - cut, 4))
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors"):
        CheckpointReader(tmp_path)


def test_file_cut_after_opening_is_refused_at_reading(tmp_path):
    reader = CheckpointReader(save_single(tmp_path, {"a": TENSORS["a"]}))
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 4)
    with pytest.raises(CheckpointError, match="ends within the tensor 'a'"):
        _ = reader["a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c": "model-00003-of-00002.safetensors"}, "model-00003-of-00002.safetensors: this shard is missing.*'c'"),
        ({"lost": "model-00001-of-00002.safetensors"}, "'lost'"),
        ({"b": None}, "'b', which the index"),
        ({"a": "../model.safetensors"}, "outside the folder"),
    ],
)
def test_index_that_contradicts_the_shards_is_refused(changes, message, tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    save_single(tmp_path)
    save_sharded(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"] | changes
    write_index(folder, {name: shard for name, shard in index.items() if shard})
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    "info", [{"shape": [3, 4], "data_offsets": [0, 40]}, {"dtype": "C64", "shape": [3, 2], "data_offsets": [0, 48]}]
)
def test_header_that_contradicts_itself_is_refused(info, tmp_path):
    text = json.dumps({"broken": {"dtype": "F32", **info}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(48))
    with pytest.raises(CheckpointError, match="model.safetensors: "):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_pickle_is_refused_by_name_unless_allowed(is_sharded, tmp_path):
    if is_sharded:
        save_sharded(tmp_path, suffix="bin", stem="pytorch_model")
    else:
        torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.*\.bin: a pickle.*--allow-pickle"):
        CheckpointReader(tmp_path)
    reader = CheckpointReader(tmp_path, allow_pickle=True)
    assert set(reader) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert reader.names[name].shape == tuple(tensor.shape)
        assert torch.equal(reader[name], tensor)


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_state_dict_alone_is_read_and_no_code_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": TENSORS, "epoch": 3, "callbacks": Malicious()}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last.ckpt.*save the state_dict alone"):
        read_pickle(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "plain.ckpt")
    assert read_pickle(tmp_path / "plain.ckpt").keys() == TENSORS.keys()
    os.truncate(tmp_path / "plain.ckpt", (tmp_path / "plain.ckpt").stat().st_size - 100)
    with pytest.raises(CheckpointError, match="plain.ckpt: .*damaged"):
        read_pickle(tmp_path / "plain.ckpt")


@pytest.mark.parametrize("content", [[TENSORS], {"state_dict": 3}, {"a": 1.0}, {0: torch.zeros(1)}], ids=repr)
def test_pickle_without_tensors_by_name_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="other.ckpt: it holds no tensors by name"):
        read_pickle(tmp_path / "other.ckpt")


@pytest.mark.parametrize("content", [b"https://example.org/vqgan.ckpt\n", b"Repository not found", b"GGUF\x03\0\0\0"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / "link.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"link.ckpt: .*damaged"):
        read_pickle(tmp_path / "link.ckpt")


def test_json_is_an_object_or_refused_by_file(tmp_path):
    path = tmp_path / "settings.json"
    assert read_json(path, default={}) == {}
    with pytest.raises(CheckpointError, match="settings.json: no such file"):
        read_json(path)
    for text in ('{"a": ', "[1]"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="settings.json.*JSON"):
            read_json(path, default={})


def test_safetensors_win_over_pickles(tmp_path):
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert set(CheckpointReader(save_single(tmp_path), allow_pickle=True)) == set(TENSORS)


def test_folder_without_weights_or_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither model.safetensors"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder.*hf download"):
        CheckpointReader(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="config.json"):
        _ = CheckpointReader(save_single(tmp_path)).config


def test_adapters_beside_the_weights_are_refused(tmp_path):
    save_single(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it holds adapters .adapter_config.json. .*merge_and_unload"):
        CheckpointReader(tmp_path)
