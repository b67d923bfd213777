# SPDX-License-Identifier: Apache-2.0
"""Errors that a user reads in one line: bad input, missing extras, full disks, which every library reports its way."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors_moma import InputError


# no space, a user's quota, the largest file that a process may write
_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# messages of libraries that keep the system's text without its number, or neither, as torch
_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Not enough disk space",
    "PytorchStreamWriter failed writing",
    "unexpected pos ",
)
# what gloo says in processes of a training of which another one has ended, and torch of a checkpoint that it removed
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Parent directory")
_TO_RESUME = ("What was written before is whole.", "the same command with `--resume` goes on.")
# subcommand -> what is safe and how to go on
_WAYS = {
    "tokenize": ("The shards that are done are whole.", "the same command goes on."),
    "pretrain": _TO_RESUME,
    "train-auxiliary-routers": _TO_RESUME,
    "train-image-tokenizer": _TO_RESUME,
}


class MissingExtraError(ImportError):
    """A library that an extra of this package brings is not installed; the message says how to get it."""


class KilledProcessError(RuntimeError):
    """A process beside this one was killed; the message says what is safe and how to go on."""


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Raise [`MissingExtraError`] in place of any ImportError in the block."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f'{what} ({error}): pip install "modeling-moma[{extra}]"') from error


def is_input_error(error: BaseException) -> bool:
    """Return whether an error says what is wrong with an input; any other is a defect, and keeps its traceback."""
    if isinstance(error, InputError):
        return True
    # a path that a user gave, and may not enter, or that no system would take
    if isinstance(error, OSError) and error.filename is not None:
        refused = isinstance(error, (PermissionError, NotADirectoryError, FileExistsError))
        if refused or error.errno == errno.ENAMETOOLONG:
            return True
    # Both take time to import, and have been where one of their errors is raised.
    from huggingface_hub.errors import StrictDataclassError

    from tokenization.processor_errors_moma import InputError as ProcessorInputError

    # The fields of a configuration are checked by the former.
    return isinstance(error, (StrictDataclassError, ProcessorInputError))


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came from, says that the disk is full."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _CODES:
            return True
        # others raise OSError, RuntimeError or an exception of their own
        if isinstance(error, Exception) and any(text in str(error) for text in _TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error says that another process of the same training has ended."""
    is_one_of_many = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    return is_one_of_many and any(text in str(error) for text in _LOST_PEER)


def full_disk_line(error: BaseException, subcommand: str, output: str | None) -> str:
    """Return the line that a user reads in place of a traceback."""
    named = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else None
    place, free = _fullest(output or named or ".")
    if free >= 1:
        # libraries write elsewhere, too
        caches = (os.environ.get("HF_DATASETS_CACHE"), os.environ.get("HF_HOME"), tempfile.gettempdir())
        other, left = _fullest(*filter(None, caches))
        place, free = (other, left) if left < 1 else (place, free)
    # with free space on the disk, a quota or a limit is the cause, and the system's message says more
    detail = "" if free < 1 else f" ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    safe, way = _WAYS.get(subcommand, ("", "give the same command again."))
    line = f"the disk is full: {free:.1f} MiB are free at {os.fspath(place)!r}{detail}."
    return " ".join(part for part in (line, safe, f"Make room, and {way}") if part)


def _fullest(*places: str) -> tuple[Path, float]:
    """Return the place on the fullest disk, or the folder above it that there is, and its free MiB."""
    found = []
    for place in map(Path, places):
        there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
        found.append((there, shutil.disk_usage(there).free / 2**20))
    return min(found, key=lambda entry: entry[1])


def stopped_line(subcommand: str) -> str:
    """Return the line that a user reads who has stopped a command, as by Ctrl-C."""
    safe, way = _WAYS.get(subcommand, ("", ""))
    return " ".join(part for part in ("stopped.", safe, way[:1].upper() + way[1:]) if part)
