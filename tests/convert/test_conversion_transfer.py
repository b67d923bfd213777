# SPDX-License-Identifier: Apache-2.0
import os
import platform
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_moma import MomaConfig, MomaForCausalLM
from modeling_moma.convert.reading import CheckpointError, CheckpointReader
from modeling_moma.convert.transfer import decoder_entries, transfer


CONFIG = MomaConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=32,
    image_seq_length=4,
    modality_token_ranges={"image": [[8, 16]]},
    begin_image_token_id=16,
    end_image_token_id=17,
    num_experts={"text": 1, "image": 1},
)
HEAD = "lm_head.weight"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MomaForCausalLM(CONFIG)


@pytest.fixture
def reader(model, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "moma"}')
    save_file(model.state_dict(), folder / "model.safetensors")
    return CheckpointReader(folder)


@pytest.fixture
def entries():
    """Those of a source that is a MoMa, too."""
    entries = decoder_entries(CONFIG).values()
    for entry in entries:
        entry.source = entry.name
    return list(entries)


def head_of(entries):
    return next(entry for entry in entries if entry.name == HEAD)


def test_folder_holds_the_tensors_in_shards_of_the_size_asked_for(reader, entries, model, tmp_path):
    receipt = transfer(reader, CONFIG, entries, tmp_path / "moma", max_shard_size="4KB")
    shards = sorted((tmp_path / "moma").glob("model-*.safetensors"))
    assert len(shards) == receipt.files > 1
    assert receipt.tensor_bytes == 4 * model.num_parameters()
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    for shard in shards:
        assert sum(tensor.nbytes for tensor in load_file(shard).values()) <= max(4000, largest)
    loaded, report = MomaForCausalLM.from_pretrained(tmp_path / "moma", output_loading_info=True)
    assert not any(report.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_tensors_keep_their_types_unless_one_is_asked_for(reader, entries, model, tmp_path):
    tensors = {name: tensor if "norm" in name else tensor.half() for name, tensor in model.state_dict().items()}
    save_file(tensors, reader.folder / "model.safetensors")
    reader = CheckpointReader(reader.folder)
    for dtype in (None, torch.bfloat16):
        transfer(reader, CONFIG, entries, tmp_path / str(dtype), dtype=dtype)
        loaded = load_file(tmp_path / str(dtype) / "model.safetensors")
        for name, tensor in tensors.items():
            assert loaded[name].dtype == (dtype or tensor.dtype)
            assert torch.equal(loaded[name], tensor.to(loaded[name].dtype))


def test_types_that_no_model_is_loaded_in_are_refused(reader, entries, model, tmp_path):
    tensors = model.state_dict()
    save_file({**tensors, HEAD: tensors[HEAD].to(torch.float8_e4m3fn)}, reader.folder / "model.safetensors")
    reader = CheckpointReader(reader.folder)
    with pytest.raises(CheckpointError, match=f"'{HEAD}' is in torch.float8_e4m3fn, .*`--dtype bfloat16`"):
        transfer(reader, CONFIG, entries, tmp_path / "moma")
    transfer(reader, CONFIG, entries, tmp_path / "moma", dtype=torch.bfloat16)
    assert MomaForCausalLM.from_pretrained(tmp_path / "moma", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "absent"}, "lacks the key 'absent'"),
        ({"source_shape": (48, 15)}, r"\(48, 16\).*\(48, 15\)"),
        ({"source": None}, f"nothing takes the key '{HEAD}'"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_before_any_tensor_is_read(fields, message, reader, entries, tmp_path):
    def build(*tensors):
        raise AssertionError("read")

    for entry in entries:
        entry.build = build
    vars(head_of(entries)).update(fields)
    with pytest.raises(CheckpointError, match=message):
        transfer(reader, CONFIG, entries, tmp_path / "moma")
    assert not [path for path in tmp_path.iterdir() if "moma" in path.name]


def test_left_out_keys_are_counted_by_reason(reader, entries, tmp_path):
    vars(head_of(entries)).update(source=None, build=lambda: torch.ones(48, 16))
    receipt = transfer(reader, CONFIG, entries, tmp_path / "moma", ignored={"lm_*": "made anew", "x": "absent"})
    assert receipt.ignored == {"made anew": 1}
    assert (receipt.taken, receipt.new) == (len(entries) - 1, 1)


def test_wrong_result_of_a_builder_and_an_interrupt_leave_nothing(reader, entries, tmp_path):
    entries[5].build = lambda tensor: tensor[:1]
    with pytest.raises(CheckpointError, match="came out as"):
        transfer(reader, CONFIG, entries, tmp_path / "moma")

    def interrupt(tensor):
        raise KeyboardInterrupt

    entries[5].build = interrupt
    with pytest.raises(KeyboardInterrupt):
        transfer(reader, CONFIG, entries, tmp_path / "moma")
    assert not [path for path in tmp_path.iterdir() if "moma" in path.name]


@pytest.mark.parametrize("difference", [2e-3, float("nan")])
def test_probe_that_fails_leaves_nothing(difference, reader, entries, tmp_path):
    with pytest.raises(CheckpointError, match="probe batch"):
        measured = {"relative_difference": difference}
        transfer(reader, CONFIG, entries, tmp_path / "moma", probe=lambda converted: measured)
    assert not [path for path in tmp_path.iterdir() if "moma" in path.name]


def test_left_over_of_a_killed_run_is_cleared_away(reader, entries, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    node = platform.node()
    # the last one has been this process's number before it was ours
    for process in (ended.pid, os.getpid()):
        aside = tmp_path / f".moma.{node}-{process}-{process}.partial"
        aside.mkdir()
        (aside / "model-00001-of-00009.safetensors").write_text("half")
    others = [f".moma.{node}-{os.getppid()}-1.partial", f".moma.elsewhere-{ended.pid}-1.partial", ".moma.mine.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    transfer(reader, CONFIG, entries, tmp_path / "moma", extras=lambda folder: (folder / "note.txt").write_text("x"))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "moma", *others}
    assert not list((tmp_path / "moma").glob("model-*"))
    assert (tmp_path / "moma" / "note.txt").exists()


def test_output_that_comes_to_exist_meanwhile_is_left_alone(reader, entries, tmp_path):
    def write_the_same(folder):
        (tmp_path / "moma").mkdir()
        (tmp_path / "moma" / "config.json").write_text("of another conversion")

    with pytest.raises(CheckpointError, match="not empty"):
        transfer(reader, CONFIG, entries, tmp_path / "moma", extras=write_the_same)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "moma"}
    assert (tmp_path / "moma" / "config.json").read_text() == "of another conversion"


def test_output_that_is_there_and_empty_is_written_into(reader, entries, tmp_path, monkeypatch):
    output = tmp_path / "moma"
    output.mkdir()
    # of a killed process of another machine, which may still be at work
    (output / ".moma.elsewhere-1-1.partial").mkdir()
    before = output.stat().st_ino
    monkeypatch.chdir(output)
    transfer(reader, CONFIG, entries, ".")
    assert output.stat().st_ino == before
    assert MomaForCausalLM.from_pretrained(output).config.vocab_size == CONFIG.vocab_size
    assert [path.name for path in output.glob(".*")] == [".moma.elsewhere-1-1.partial"]


def test_hidden_folder_with_all_weights_but_no_config_does_not_load(reader, entries, tmp_path):
    seen = []

    def probe(converted):
        with pytest.raises((OSError, ValueError, RuntimeError)):
            MomaForCausalLM.from_pretrained(converted.folder)
        seen.append(converted.folder)
        return {"relative_difference": 0.0}

    transfer(reader, CONFIG, entries, tmp_path / "moma", probe=probe)
    assert len(seen) == 1 and not seen[0].exists()
