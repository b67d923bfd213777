# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import pytest

from writing import write_aside, write_folder_aside


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
