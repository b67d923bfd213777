# SPDX-License-Identifier: Apache-2.0
"""Arrays that grow on the disk, entry by entry, and are read without being loaded."""

from pathlib import Path
from typing import BinaryIO

import numpy as np


class ArrayWriter:
    """A `.npy` file that is written entry by entry, so that memory holds one of them at a time."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type = np.uint8):
        self.shape, self.dtype, self.count = shape, np.dtype(dtype), 0
        self._file: BinaryIO = open(path, "wb")
        self._write_header()
        self._start = self._file.tell()
        self._bytes = self.dtype.itemsize * int(np.prod(shape))

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, *error) -> None:
        """Write how many entries there are, and close the file."""
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._start:
            raise RuntimeError(f"numpy left no room for the number of entries ({self.count}) in the file's header.")
        self._file.close()

    def write(self, entry: np.ndarray, index: int | None = None) -> None:
        """Append an entry, or replace that of an index."""
        place = self.count if index is None else index
        self._file.seek(self._start + place * self._bytes)
        self._file.write(np.ascontiguousarray(entry, dtype=self.dtype).tobytes())
        self.count = max(self.count, place + 1)

    def extend(self, entries: np.ndarray) -> None:
        """Append several entries, `(entries, *shape)`."""
        self._file.seek(self._start + self.count * self._bytes)
        self._file.write(np.ascontiguousarray(entries, dtype=self.dtype).tobytes())
        self.count += len(entries)

    def drop_last(self) -> None:
        """Remove the last entry."""
        self.count -= 1
        self._file.truncate(self._start + self.count * self._bytes)

    def _write_header(self) -> None:
        # numpy pads it so that the first axis can grow
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.count, *self.shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


def read_array(path: Path) -> np.ndarray:
    """Return the array of a `.npy` file, of which only what is used is read from the disk."""
    # "c" and not "r": torch warns of arrays that it must not write to
    return np.load(path, mmap_mode="c")


def read_whole_array(path: Path, count: int) -> np.ndarray | None:
    """Return what [`read_array`] does, or `None` where the file is missing, damaged or of another length."""
    try:
        array = read_array(path)
    # an empty file, one that is cut short, or something else
    except (OSError, ValueError, EOFError):
        return None
    return array if len(array) == count else None
