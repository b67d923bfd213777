# SPDX-License-Identifier: Apache-2.0
"""A lock on an output folder, so that two runs at a time do not mix in it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from ..errors_moma import InputError
from ..token_groups_moma import is_distributed
from ..utils.atomic_files import LEFT_OVER


try:
    import fcntl
except ImportError:
    fcntl = None


# what a killed run leaves counts as no content of its folder
LOCK_FILE = f".lock{LEFT_OVER}"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)
# each but the first follows a run that has ended in between
_ATTEMPTS = 10
# descriptors of this process alone
_held: set[int] = set()


def _leave_to_parent() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    # the workers of a killed run live on for some seconds, and would hold its lock
    os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def sole_run(output: str | Path, is_first: bool = True) -> Iterator[None]:
    """Hold an output folder for one run; the system lets go of it where the process is killed.

    A folder that cannot be written into, or whose file system knows no locks, is used without.
    """
    folder = Path(output)
    is_new = is_first and not folder.exists()
    descriptor = _lock(folder / LOCK_FILE) if is_first else None
    is_taken = [is_first and descriptor is None]
    if is_distributed():
        dist.broadcast_object_list(is_taken, src=0)
    if is_taken[0]:
        raise InputError(
            f"`--output` {str(output)!r} is in use: another training is at work in it, here or on another machine. "
            "Wait for its end, or give another `--output`."
        )
    try:
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            (folder / LOCK_FILE).unlink(missing_ok=True)
            os.close(descriptor)
        if is_new:
            # of a run that failed before it wrote anything
            with suppress(OSError):
                folder.rmdir()


def _lock(path: Path) -> int | None:
    """Return the descriptor of a file that is now locked, -1 where none can be, `None` where another holds it."""
    if fcntl is None:
        return -1
    for _ in range(_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            break
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # who held it before may have removed it since
            is_there = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            is_there = False
        except OSError as error:
            os.close(descriptor)
            if error.errno in _HELD_BY_ANOTHER:
                return None
            break
        if is_there:
            _held.add(descriptor)
            return descriptor
        os.close(descriptor)
    return -1
