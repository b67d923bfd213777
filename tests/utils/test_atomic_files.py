# SPDX-License-Identifier: Apache-2.0
import json
import os
import threading
import time

import pytest

from helpers.processes import start_process
from modeling_moma.utils.atomic_files import path_aside, refuse_files, replace_folder, write_aside, write_folder_aside


WRITES = 200


def fail_after(action):
    def write(path):
        action(path)
        raise OSError("disk full")

    return write


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new folder" / "report.txt"
    write_aside(path, lambda aside: aside.write_text("old"))
    with pytest.raises(OSError, match="disk full"):
        write_aside(path, fail_after(lambda aside: aside.write_text("half")))
    assert path.read_text() == "old"
    assert [child.name for child in path.parent.iterdir()] == ["report.txt"]


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
        write_aside(path, lambda aside: aside.write_text(json.dumps([writer] * size)))


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


def test_left_over_of_a_killed_writer_is_removed_by_the_next_one(tmp_path):
    path = tmp_path / "model"
    process = start_process(fall_asleep, path)
    while not list(tmp_path.glob(".model.*/weights")):
        assert process.is_alive()
        time.sleep(0.01)
    # a writer at work is let alone
    write_folder_aside(path, fill_with("whole", "weights"))
    assert len(list(tmp_path.iterdir())) == 2
    process.kill()
    process.join()
    write_folder_aside(path, fill_with("anew", "weights"))
    assert [child.name for child in tmp_path.iterdir()] == ["model"]
    assert (path / "weights").read_text() == "anew"


@pytest.mark.parametrize("write", [write_folder_aside, replace_folder])
@pytest.mark.parametrize("exists", [False, True], ids=["missing", "empty"])
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


def test_replaced_folder_keeps_nothing_of_the_older_one(tmp_path):
    path = tmp_path / "codes"
    replace_folder(path, fill_with("old", "one", "two"))
    with pytest.raises(OSError, match="disk full"):
        replace_folder(path, fail_after(fill_with("half", "one")))
    assert {child.name: child.read_text() for child in path.iterdir()} == {"one": "old", "two": "old"}
    replace_folder(path, fill_with("new", "one"))
    assert {child.name: child.read_text() for child in path.iterdir()} == {"one": "new"}
    assert [child.name for child in tmp_path.iterdir()] == ["codes"]


def test_folder_that_cannot_be_put_in_place_leaves_the_older_one(tmp_path, monkeypatch):
    path, rename = tmp_path / "codes", os.rename
    replace_folder(path, fill_with("old", "one"))

    def refuse(source, target):
        if target == path and "older" not in source.name:
            raise PermissionError("not here")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError, match="not here"):
        replace_folder(path, fill_with("new", "one"))
    assert (path / "one").read_text() == "old"
    assert [child.name for child in tmp_path.iterdir()] == ["codes"]


def test_folder_that_cannot_be_put_in_place_says_why(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError, match="not here"):
        replace_folder(tmp_path / "codes", fill_with("new", "one"))
    assert not list(tmp_path.iterdir())


def test_left_overs_do_not_make_a_folder_one_of_something_else(tmp_path):
    path_aside(tmp_path / "report.json").write_text("half")
    refuse_files(str(tmp_path))
    (tmp_path / "weights").write_text("")
    with pytest.raises(ValueError, match=f"`--output` '{tmp_path}' has files of something else .* 'weights'"):
        refuse_files(tmp_path)
