# SPDX-License-Identifier: Apache-2.0
"""Disks that are really full: one line, nothing of what was written is lost, and the same command goes on."""

import errno
import json
import resource
import shutil
import subprocess
from traceback import StackSummary

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from helpers.tiny import four_steps, noise_images, trainer_flags, write_training
from modeling_moma.cli.main import main
from modeling_moma.cli.pretrain import parse_arguments
from modeling_moma.training import checkpoints
from modeling_moma.training.checkpoints import last_checkpoint, without_incomplete_checkpoints
from modeling_moma.training.pretraining import build_trainer


DISK_BYTES = 64 * 2**20


class FullDisk:
    """A file system in memory, with as much room as a test wants."""

    def __init__(self, folder):
        self.folder = folder

    def leave(self, size):
        ballast = self.folder / "ballast"
        ballast.unlink(missing_ok=True)
        with ballast.open("wb") as file:
            file.truncate(0)
            free = shutil.disk_usage(self.folder).free
            file.write(bytes(max(free - size, 0)))

    def make_room(self):
        (self.folder / "ballast").unlink(missing_ok=True)

    def rounds(self, shares):
        return shares


class LargestFile:
    """Where nothing can be mounted: files of this process may have so many bytes, which the system holds it to."""

    def __init__(self, folder):
        self.folder, self.before = folder, resource.getrlimit(resource.RLIMIT_FSIZE)

    def leave(self, size):
        # above what records and settings take, and below weights and shards
        resource.setrlimit(resource.RLIMIT_FSIZE, (min(size, 8192), self.before[1]))

    def make_room(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

    def rounds(self, shares):
        # whatever is left, the same file is the first that is too large
        return shares[:1]


@pytest.fixture(params=["full disk", "limit"])
def disk(request, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "limit":
        limit = LargestFile(folder)
        yield limit
        limit.make_room()
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)])
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system in memory; the other parameter does without")
    yield FullDisk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("is_first", [True, False])
def test_shards_that_a_full_disk_cut_short_leave_one_error_and_no_torn_checkpoint(inputs, tmp_path, is_first):
    trainer = build_trainer(parse_arguments(four_steps(inputs, tmp_path, "recipe")))
    trainer.is_world_process_zero = lambda: is_first
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left") as raised, without_incomplete_checkpoints(trainer):
        (tmp_path / "checkpoint-2").mkdir()
        # as torch.distributed.checkpoint tells of it on every process
        raise CheckpointException("write", {1: (full, StackSummary())})
    assert isinstance(raised.value.__cause__, CheckpointException)
    # the first process may still be at work in it
    assert (tmp_path / "checkpoint-2").exists() == (not is_first)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_training(folder, num_hidden_layers=1, num_attention_heads=2)
    rows = {"image": noise_images(300), "label": [f"thing {index}" for index in range(300)]}
    features = Features({"image": Image(), "label": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    source = {"data": str(folder / "train.parquet"), "image": "image", "text": "label", "codings": 4}
    (folder / "sources.yaml").write_text(json.dumps({"sources": {"things": source}}))
    return folder


def tokenize(inputs, output):
    options = ["--rows-per-shard", "128", "--processes", "1"]
    paths = ["--processor", str(inputs / "processor"), "--output", str(output)]
    return main(["tokenize", str(inputs / "sources.yaml"), *paths, *options])


def pretrain(inputs, output):
    paths = ["--processor", str(inputs / "processor"), "--tokens", str(inputs / "tokens"), "--output", str(output)]
    sizes = {"max_steps": 4, "per_device_train_batch_size": 2, "eval_steps": 4, "save_steps": 1, "warmup_steps": 1}
    return main(["pretrain", str(inputs / "recipe.json"), *paths, *trainer_flags(**sizes, bf16=False), "--resume"])


def train_image_tokenizer(inputs, output):
    config = {"resolution": 16, "patch_size": 4, "channel_multiplier": [1], "base_channels": 16, "latent_channels": 16}
    config |= {"embed_dim": 8, "num_embeddings": 32, "num_res_blocks": 1, "norm_type": "none"}
    (inputs / "config.json").write_text(json.dumps(config))
    fields = ("steps=4", "batch_size=2", "save_every=2", "warmup_steps=1", "held_out_images=4", "bf16=off")
    changes = [f"image_tokenizer.{field}" for field in (f"config={inputs / 'config.json'}", *fields)]
    paths = [str(inputs / "sources.yaml"), "--output", str(output)]
    return main(["train-image-tokenizer", *paths, "--set", *changes, "--resume"])


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def assert_one_line(capsys, disk, says):
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the disk is full: ") and str(disk.folder) in line and line.endswith(says)


def assert_same_weights(first, second):
    mine, expected = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert mine.keys() == expected.keys() and all(torch.equal(mine[name], expected[name]) for name in expected)


def contents(folder, kind):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob(kind)}


def test_tokens(inputs, disk, tmp_path, capsys):
    assert tokenize(inputs, tmp_path / "whole") == 0
    output = disk.folder / "tokens"
    for share in disk.rounds((0.02, 0.3, 0.2)):
        disk.leave(int(share * size_of(tmp_path / "whole")))
        assert tokenize(inputs, output) == 1
        disk.make_room()
        assert_one_line(capsys, disk, "The shards that are done are whole. Make room, and the same command goes on.")
        assert not [path for path in output.rglob("*") if ".partial" in path.name]
        whole = contents(tmp_path / "whole", "*.arrow")
        assert contents(output, "*.arrow").items() <= whole.items()
    assert tokenize(inputs, output) == 0
    for kind in ("*.arrow", "*.json"):
        assert contents(output, kind) == contents(tmp_path / "whole", kind)


GO_ON = "What was written before is whole. Make room, and the same command with `--resume` goes on."


def test_checkpoints(inputs, disk, tmp_path, capsys, monkeypatch):
    assert pretrain(inputs, tmp_path / "whole") == 0
    size = size_of(tmp_path / "whole" / "checkpoint-4")
    output = disk.folder / "run"
    before, torn = None, []

    def incomplete_checkpoints(folder, find=checkpoints.incomplete_checkpoints):
        torn.append(find(folder))
        return torn[-1]

    monkeypatch.setattr(checkpoints, "incomplete_checkpoints", incomplete_checkpoints)
    # within the model, the optimizer and what comes after it, of the first checkpoint and of a later one
    for share in disk.rounds((0.1, 0.6, 0.98, 1.6)):
        disk.leave(int(share * size))
        assert pretrain(inputs, output) == 1
        disk.make_room()
        assert_one_line(capsys, disk, GO_ON)
        names = sorted(path.name for path in output.glob("checkpoint-*"))
        # none that takes room and is of no use
        assert all((output / name / "trainer_state.json").is_file() for name in names)
        assert before is None or last_checkpoint(output) is not None
        before = last_checkpoint(output)
    assert any(torn), "no checkpoint was begun on a full disk"
    assert pretrain(inputs, output) == 0
    assert_same_weights(output, tmp_path / "whole")


def test_checkpoints_of_the_image_tokenizer(inputs, disk, tmp_path, capsys):
    assert train_image_tokenizer(inputs, tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole" / "images", disk.folder / "run" / "images")
    size = size_of(tmp_path / "whole" / "checkpoint-0000004")
    for share in disk.rounds((0.1, 0.6, 1.5)):
        disk.leave(int(share * size))
        assert train_image_tokenizer(inputs, disk.folder / "run") == 1
        disk.make_room()
        assert_one_line(capsys, disk, GO_ON)
        assert not list((disk.folder / "run").glob("*.partial"))
    assert train_image_tokenizer(inputs, disk.folder / "run") == 0
    assert_same_weights(disk.folder / "run", tmp_path / "whole")


def test_a_damaged_file_is_no_full_disk(inputs, tmp_path, capsys):
    """What reads torch's files speaks of the same source file as what writes them."""
    assert pretrain(inputs, tmp_path / "run") == 0
    (tmp_path / "run" / "trainer_state.json").unlink()
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").write_bytes(b"PK" + bytes(100))
    with pytest.raises(Exception) as raised:
        pretrain(inputs, tmp_path / "run")
    assert "disk" not in str(raised.value)
