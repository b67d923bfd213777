# SPDX-License-Identifier: Apache-2.0
"""A folder is held for one run at a time, and by no dead one."""

import errno
import os
import signal
import time

import pytest

from helpers.processes import run_group, start_process
from helpers.tiny import trainer_flags, write_training
from modeling_moma.cli.main import main
from modeling_moma.errors_moma import InputError
from modeling_moma.training import output_lock
from modeling_moma.training.output_lock import LOCK_FILE, sole_run
from modeling_moma.utils.atomic_files import check_new_folder


def hold_for_ever(output, signs):
    """Hold the folder, as a training does that has a worker, and tell the worker's number."""
    with sole_run(output):
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        (signs / "partial").write_text(str(worker))
        (signs / "partial").rename(signs / "worker")
        time.sleep(60)


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    output, signs = tmp_path / "out", tmp_path / "signs"
    signs.mkdir()
    process = start_process(hold_for_ever, output, signs)
    while not (signs / "worker").exists():
        assert process.is_alive()
        time.sleep(0.01)
    with pytest.raises(InputError, match=f"`--output` '{output}' is in use"), sole_run(output):
        pass
    process.kill()
    process.join()
    # what it has left is no content, and its worker holds nothing
    assert (output / LOCK_FILE).exists()
    check_new_folder(output)
    with sole_run(output):
        (output / "config.json").touch()
    assert [path.name for path in output.iterdir()] == ["config.json"]
    os.kill(int((signs / "worker").read_text()), signal.SIGKILL)


def test_a_folder_made_for_a_run_that_wrote_nothing_is_gone(tmp_path):
    with pytest.raises(KeyError), sole_run(tmp_path / "out"):
        raise KeyError
    assert not (tmp_path / "out").exists()


def test_a_place_without_locks_is_used_without(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_lock.fcntl, "flock", flock)
    with sole_run(tmp_path / "out"), sole_run(tmp_path / "out"):
        pass
    (tmp_path / "file").touch()
    with sole_run(tmp_path / "file" / "out"):
        pass


def be_refused(rank, output):
    with pytest.raises(InputError, match="is in use"), sole_run(output, rank == 0):
        pass
    with sole_run(output / "other", rank == 0):
        pass


def test_all_processes_of_a_run_are_refused_alike(tmp_path):
    with sole_run(tmp_path):
        run_group(be_refused, tmp_path)


@pytest.mark.parametrize("command", ["pretrain", "train-auxiliary-routers"])
def test_trainings_refuse_a_folder_in_use_in_one_line(tmp_path, capsys, command):
    write_training(tmp_path)
    processor = [f"--processor={tmp_path / 'processor'}", f"--tokens={tmp_path / 'tokens'}"]
    model = str(tmp_path / "recipe.json") if command == "pretrain" else f"--model={tmp_path / 'none'}"
    given = [command, model, *processor, f"--output={tmp_path / 'out'}", *trainer_flags(max_steps=2)]
    with sole_run(tmp_path / "out"):
        assert main(given) == 2
    assert f"error: `--output` '{tmp_path / 'out'}' is in use" in capsys.readouterr().err
