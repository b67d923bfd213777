# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers.processes import start_process
from modeling_moma.utils.atomic_files import (
    atomic_write,
    check_new_folder,
    check_place,
    path_aside,
    replace_folder,
    write_folder_aside,
)


ROOT = Path(__file__).parents[2]
WRITES = 200


def fail_after(action):
    def write(path):
        action(path)
        raise OSError("disk full")

    return write


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new folder" / "report.txt"
    atomic_write(path, lambda aside: aside.write_text("old"))
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail_after(lambda aside: aside.write_text("half")))
    assert path.read_text() == "old"
    assert [child.name for child in path.parent.iterdir()] == ["report.txt"]


def test_a_link_to_a_file_stays_one_and_its_target_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    for name in ("there.csv", "not-yet.csv"):
        target, link = tmp_path / "far" / name, tmp_path / name
        link.symlink_to(target)
        target.write_text("old") if name == "there.csv" else None
        check_place(link)
        assert atomic_write(link, lambda aside: aside.write_text("new")) == link
        assert link.is_symlink() and target.read_text() == "new" and not target.is_symlink()
    assert sorted(child.name for child in tmp_path.iterdir()) == ["far", "not-yet.csv", "there.csv"]


def test_a_failed_folder_leaves_the_old_files(tmp_path):
    def write(text):
        def fill(folder):
            (folder / "inner").mkdir(parents=True)
            (folder / "inner" / "weights").write_text(text)

        return fill

    path = tmp_path / "model"
    write_folder_aside(path, write("old"))
    (path / "README.md").write_text("stays")
    with pytest.raises(OSError, match="disk full"):
        write_folder_aside(path, fail_after(write("half")))
    assert (path / "inner" / "weights").read_text() == "old"
    write_folder_aside(path, write("new"))
    assert (path / "inner" / "weights").read_text() == "new"
    assert (path / "README.md").read_text() == "stays"
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def fill_with(text, *names):
    def fill(folder):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(text)

    return fill


def write_often(path, writer, size):
    for _ in range(WRITES):
        atomic_write(path, lambda aside: aside.write_text(json.dumps([writer] * size)))


def test_several_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "report.json"
    # processes, and two threads of this one
    writers = [start_process(write_often, path, "process", size) for size in (3, 3000)]
    threads = [threading.Thread(target=write_often, args=(path, "thread", size)) for size in (30, 30_000)]
    for thread in threads:
        thread.start()
    while any(each.is_alive() for each in (*writers, *threads)):
        if path.exists():
            found = json.loads(path.read_text())
            assert len(set(found)) == 1 and len(found) in (3, 30, 3000, 30_000)
        time.sleep(0.001)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [child.name for child in tmp_path.iterdir()] == ["report.json"]


def fall_asleep(path):
    def write(aside):
        aside.mkdir()
        (aside / "weights").write_text("half")
        time.sleep(60)

    write_folder_aside(path, write)


@pytest.mark.parametrize(
    ("write", "exists"),
    [(write_folder_aside, False), (replace_folder, False), (replace_folder, True)],
    ids=["missing", "missing, to be replaced", "empty, to be replaced"],
)
def test_new_folder_appears_whole(tmp_path, monkeypatch, exists, write):
    path = tmp_path / "model"
    if exists:
        path.mkdir()
    seen, rename = [], os.rename

    def watched(source, target):
        seen.append(sorted(child.name for child in path.glob("*")))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail("file by file"))
    write(path, fill_with("new", "config", "weights"))
    assert seen and not any(seen)
    assert {child.name: child.read_text() for child in path.iterdir()} == {"config": "new", "weights": "new"}


def test_folder_that_is_there_stays_the_same_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    write_folder_aside(".", fill_with("new", "config.json", "weights"))
    assert tmp_path.stat().st_ino == before
    assert {child.name: child.read_text() for child in tmp_path.iterdir()} == {"config.json": "new", "weights": "new"}


def test_left_over_in_a_folder_that_is_there_is_removed_by_the_next_writer(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    process = start_process(fall_asleep, folder)
    while not list(folder.glob(".*.partial/weights")):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    write_folder_aside(folder, fill_with("whole", "weights"))
    assert [child.name for child in folder.iterdir()] == ["weights"]


def test_settings_are_put_in_place_last(tmp_path):
    def write(folder):
        for part in (folder, folder / "vq_model"):
            fill_with("new", "config.json", "weights")(part)

    # a folder of this name is in the way
    (tmp_path / "weights").mkdir()
    with pytest.raises(OSError, match="weights"):
        write_folder_aside(tmp_path, write)
    assert not list(tmp_path.rglob("config.json"))
    (tmp_path / "weights").rmdir()
    write_folder_aside(tmp_path, write)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"config.json", "vq_model/config.json", "vq_model/weights", "weights"}


# as the command does, without torch and Transformers
WRITE_TWICE = """
import sys
sys.argv, sys.orig_argv = ["-m"], ["python", "-m", "modeling_moma"]
from pathlib import Path
from modeling_moma.utils.atomic_files import write_folder_aside

folder = Path("moma")

def fill(aside):
    aside.mkdir()
    (aside / "weights").write_text("new")

for _ in range(2):
    write_folder_aside(folder, fill)
    print(*(path.name for path in folder.iterdir()))
"""


# renames across the edge of a mount fail between folders of one file system, too
@pytest.mark.parametrize("kind", ["-t tmpfs tmpfs", "--bind volume"], ids=["file system", "folder"])
def test_mount_point_is_written_into(tmp_path, kind):
    for name in ("volume", "moma"):
        (tmp_path / name).mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("mounting in a namespace needs `unshare` (Debian: util-linux)")
    probe = subprocess.run(["unshare", "-rm", "mount", *kind.split(), "moma"], cwd=tmp_path, capture_output=True)
    if probe.returncode:
        pytest.skip(f"mounting in a namespace is not allowed here: {probe.stderr.decode().strip()}")
    command = ["unshare", "-rm", "sh", "-c", f'mount {kind} moma && exec "$0" -c "$1"', sys.executable, WRITE_TWICE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["weights", "weights"]


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs a system with a mount point at /proc")
def test_mount_point_that_is_to_be_replaced_is_refused_before_anything_is_written():
    with pytest.raises(ValueError, match="'/proc' is a mount point"):
        replace_folder("/proc", lambda aside: pytest.fail("written"))


def test_replaced_folder_keeps_nothing_of_the_older_one(tmp_path):
    path = tmp_path / "codes"
    replace_folder(path, fill_with("old", "one", "two"))
    with pytest.raises(OSError, match="disk full"):
        replace_folder(path, fail_after(fill_with("half", "one")))
    assert {child.name: child.read_text() for child in path.iterdir()} == {"one": "old", "two": "old"}
    replace_folder(path, fill_with("new", "one"))
    assert {child.name: child.read_text() for child in path.iterdir()} == {"one": "new"}
    assert [child.name for child in tmp_path.iterdir()] == ["codes"]


@pytest.mark.parametrize("exists", [True, False])
def test_folder_that_cannot_be_put_in_place_leaves_the_older_one(tmp_path, monkeypatch, exists):
    path, rename = tmp_path / "codes", os.rename
    if exists:
        replace_folder(path, fill_with("old", "one"))

    def refuse(source, target):
        if target == path and "older" not in source.name:
            raise PermissionError("not here")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError, match="not here"):
        replace_folder(path, fill_with("new", "one"))
    assert [child.read_text() for child in tmp_path.rglob("one")] == ["old"] * exists
    assert [child.name for child in tmp_path.iterdir()] == ["codes"] * exists


def test_left_overs_do_not_make_a_folder_one_of_something_else(tmp_path):
    path_aside(tmp_path / "report.json").write_text("half")
    check_new_folder(str(tmp_path))
    (tmp_path / "weights").write_text("")
    with pytest.raises(ValueError, match=f"`--output` '{tmp_path}' has files in it already, .* 'weights'"):
        check_new_folder(tmp_path)


@pytest.mark.parametrize(
    "place, where", [("/proc/model", "/proc"), ("/proc", "/proc"), ("file/model", "file"), ("file", "file")]
)
def test_output_folder_that_cannot_be_written_into_is_refused_before_any_work(tmp_path, place, where):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match=f"--output: nothing can be written into '{tmp_path / where}'"):
        check_new_folder(tmp_path / place)
    assert (tmp_path / "file").read_text() == "kept"


def test_output_folder_that_is_a_link_to_nothing_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").symlink_to("gone")
    with pytest.raises(ValueError, match="--output: '.*out' is a link to 'gone', which does not exist"):
        check_new_folder(tmp_path / "out")
    (tmp_path / "gone").mkdir()
    check_new_folder(tmp_path / "out")


def test_output_folder_that_is_missing_is_not_made_by_its_check(tmp_path):
    check_new_folder(tmp_path / "new" / "model")
    assert not list(tmp_path.iterdir())


def test_a_pipe_and_a_device_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for place in (tmp_path / "pipe", tmp_path / "link", "/dev/null"):
        for write in (check_place, lambda path: atomic_write(path, lambda aside: aside.write_text("lost"))):
            with pytest.raises(ValueError, match="--output: '.*' is a device or a pipe"):
                write(place)
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link"}


def test_links_in_a_circle_are_told(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ValueError, match="--output: '.*/a/model' has links in it that lead in a circle"):
        check_new_folder(tmp_path / "a" / "model")
