# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are complete or missing, however many processes write them."""

import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

import psutil

from ..errors_moma import InputError


LEFT_OVER = ".partial"


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write beside the target and rename, so that a kill at any moment leaves the old file or the new one.

    Of several writers the last one wins.
    """
    target = Path(os.path.realpath(path))
    _refuse_device(target)
    with _aside(target) as aside:
        write(aside)
        os.replace(aside, target)
    return Path(path)


def write_folder_aside(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a folder as [`atomic_write`] a file; where the target is missing, it is renamed.

    Where the target is there already, which may be a mount point or the working directory, the new folder is written
    inside it, hidden. Once all is written its files are moved into the target one after the other, `config.json` last.
    Those that are there already are replaced, and others stay.
    """
    # `.` has no name, and what a link leads to is what is written
    target = Path(path).resolve()
    is_there = target.is_dir()
    if is_there:
        # of a writer that found no folder yet; the one above may be nobody's to read
        with suppress(OSError):
            _remove_left_overs(target)
    with _aside(target / target.name if is_there else target) as aside:
        write(aside)
        if target.is_dir() and (is_there or any(target.iterdir())):
            _move_files(aside, target)
        else:
            _rename(aside, target)
    return Path(path)


def replace_folder(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a folder as [`write_folder_aside`], but keep nothing of an older folder, not even for a moment.

    What is killed between the two renames leaves neither.
    """
    target = Path(path).absolute()
    if os.path.ismount(target):
        raise InputError(f"{str(path)!r} is a mount point, which cannot be replaced as a whole: give a folder in it.")
    with _aside(target) as aside:
        older = aside.with_name(f"{aside.name.removesuffix(LEFT_OVER)}-older{LEFT_OVER}")
        write(aside)
        if target.exists():
            os.rename(target, older)
        try:
            os.rename(aside, target)
        except OSError:
            if older.exists():
                os.rename(older, target)
            raise
        _remove(older)
    return Path(path)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Yield a [`path_aside`], of which nothing is left in the end."""
    aside = path_aside(path)
    try:
        yield aside
    finally:
        _remove(aside)


def path_aside(path: Path) -> Path:
    """Return where this thread alone writes what becomes `path`: beside it, and hidden.

    The folder of both is made where missing; what killed processes of this machine have left beside `path` is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(path)
    return _name_aside(path)


def check_new_folder(folder: str | Path, is_fine: Callable[[Path], bool] = lambda path: False):
    """Raise, before any work, for an output folder that has files in it, or that nothing can be written into."""
    check_writable(folder)
    paths = (path for path in Path(folder).glob("*") if not path.name.endswith(LEFT_OVER))
    others = sorted(path.name for path in paths if not is_fine(path))
    if others:
        raise InputError(
            f"`--output` {str(folder)!r} has files in it already, such as {others[0]!r}: give a new folder, or empty "
            "this one."
        )


def check_place(path: str | Path) -> None:
    """Make the folder of an output file, and raise where nothing can be written there."""
    if os.path.isdir(path):
        raise InputError(f"--output: {str(path)!r} is a folder; name a file in it.")
    # where a link leads to is what is written
    path = Path(os.path.realpath(path))
    _refuse_device(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path.parent, error) from error
    check_writable(path.parent)
    # the longest name of all that are written
    try:
        os.lstat(_name_aside(path))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(
            f"--output: {str(path)!r} is too long: it is written under a name of some 40 letters more, and then "
            f"renamed ({error.strerror})."
        ) from error


def check_writable(folder: str | Path) -> None:
    """Raise where nothing can be written into an output folder, or it cannot be made."""
    if Path(folder).is_symlink() and not Path(folder).exists():
        raise InputError(f"--output: {str(folder)!r} is a link to {os.readlink(folder)!r}, which does not exist.")
    place = Path(os.path.realpath(folder))
    if any(path.is_symlink() for path in (place, *place.parents)):
        raise InputError(f"--output: {str(folder)!r} has links in it that lead in a circle.")
    folder = next(path for path in (place, *place.parents) if path.exists())
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(folder, error) from error


def _refuse_device(path: Path) -> None:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"--output: {str(path)!r} is a device or a pipe, in whose place a file would be written.")


def _not_writable(folder: Path, error: OSError) -> InputError:
    return InputError(f"--output: nothing can be written into {str(folder)!r} ({error}).")


def is_of_model(path: Path) -> bool:
    """Return whether a file in an output folder is one of a model's own: its settings or weights."""
    return path.name == "config.json" or path.suffix == ".safetensors"


def _start_aside(path: Path) -> str:
    # another machine may share the disk, and its processes cannot be seen from here
    return f".{path.name}.{platform.node()}-"


def _name_aside(path: Path) -> Path:
    return path.with_name(f"{_start_aside(path)}{os.getpid()}-{threading.get_native_id()}{LEFT_OVER}")


def _remove_left_overs(path: Path) -> None:
    start, own = _start_aside(path), _name_aside(path)
    for other in path.parent.iterdir():
        process = other.name.removeprefix(start).partition("-")[0]
        if not other.name.startswith(start) or not other.name.endswith(LEFT_OVER) or not process.isdecimal():
            continue
        if other == own or not psutil.pid_exists(int(process)):
            _remove(other)


def _move_files(source: Path, target: Path) -> None:
    paths = sorted(source.rglob("*"))
    for path in filter(Path.is_dir, paths):
        (target / path.relative_to(source)).mkdir(exist_ok=True)
    # what makes a folder a model comes last, that of the whole after those of its parts
    files = [path for path in paths if not path.is_dir()]
    for path in sorted(files, key=lambda path: (path.name == "config.json", -len(path.parts))):
        os.replace(path, target / path.relative_to(source))


def _rename(source: Path, target: Path) -> None:
    if target.is_dir():
        # some systems cannot rename onto an empty folder
        target.rmdir()
    os.rename(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # where nothing can be removed, nothing could be written, of which the first error tells
        with suppress(OSError):
            path.unlink()
