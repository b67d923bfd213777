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
"""Files that are there whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_aside(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write beside the target and rename, so that a kill at any moment leaves the old file or the new one.

    Args:
        path (`str` or `Path`): the target; its folder is made where missing.
        write (`Callable`): writes to the path that it is given.

    Returns:
        `Path`: the target.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def write_folder_aside(path: str | Path, write: Callable[[Path], object]) -> Path:
    """As [`write_aside`] for the files of a folder: all are written before the first one is replaced.

    Files that are in the folder already and are not written again stay.

    Args:
        path (`str` or `Path`): the folder; made where missing.
        write (`Callable`): fills the folder that it is given.

    Returns:
        `Path`: the folder.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write(aside)
        for source in sorted(aside.rglob("*")):
            target = path / source.relative_to(aside)
            if source.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(source, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def refuse_files(folder: str, is_fine: Callable[[Path], bool] = lambda path: False):
    """Refuse an output folder with files that would mix with those of the model to be written.

    Args:
        folder (`str`): missing folders are fine.
        is_fine (`Callable`, *optional*): whether a path in it may stay; by default none.

    Raises:
        ValueError: names one of the others.
    """
    others = sorted(path.name for path in Path(folder).glob("*") if not is_fine(path))
    if others:
        raise ValueError(
            f"`--output` {folder!r} has files of something else in it, such as {others[0]!r}: give a new folder."
        )
