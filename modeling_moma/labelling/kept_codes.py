# SPDX-License-Identifier: Apache-2.0
"""What images of a folder were coded to, kept in the user's cache by their content, for the next search in it."""

import hashlib
import io
import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors.torch import load, save
from tqdm.auto import tqdm

from ..data.encoding import processor_fingerprint
from ..utils.atomic_files import atomic_write
from .images import LARGEST_FILE, SVG_ENDINGS, SVG_SIDE


# raised where the same images are read or coded to something else than before
FORM = 1
# of which others may read an image otherwise
READERS = ("pillow", "resvg_py", "transformers")
DIGEST_BYTES = hashlib.sha256().digest_size

Kept = Mapping[bytes, tuple[torch.Tensor, torch.Tensor]]


class _Hashed(io.RawIOBase):
    """A file that is hashed, and not written."""

    def __init__(self):
        super().__init__()
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)


def kept_file(folder: str, labeler: Any) -> Path:
    """Return where codes are kept of a folder, a labeler's model and processor, and what reads images."""
    settings = [FORM, SVG_SIDE, *map(_version, READERS), os.path.realpath(folder), labeler.form, labeler.views]
    key: Any = _Hashed()
    torch.save(labeler.model.state_dict(), key)
    for setting in (*settings, labeler.model.config.to_json_string(), processor_fingerprint(labeler.processor)):
        key.write(f"{setting!r}\n".encode("utf-8", "surrogateescape"))
    return Path(constants.HF_ASSETS_CACHE, "modeling-moma", "search", key.hash.hexdigest())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def content_digest(file: Path) -> bytes | None:
    """Return a hash of a file and of what reads it, `None` where it is not read."""
    try:
        if not file.is_file() or file.stat().st_size > LARGEST_FILE:
            return None
        kind = b"svg" if file.suffix.lower() in SVG_ENDINGS else b"image"
        return hashlib.sha256(kind + file.read_bytes()).digest()
    except OSError:
        return None


def read_kept(place: Path) -> Kept:
    """Return codes and states of images by their digests; none where the file is missing or damaged."""
    try:
        data = place.read_bytes()
    except OSError:
        return {}
    if hashlib.sha256(data[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
        return {}
    tensors = load(data[DIGEST_BYTES:])
    names = (row.tobytes() for row in tensors["digests"].numpy())
    return dict(zip(names, zip(tensors["codes"], tensors["states"], strict=True), strict=True))


def write_kept(place: Path, kept: Kept) -> None:
    """Write what [`read_kept`] reads; where nothing can be written, it is told."""
    codes, states = (torch.stack(parts) for parts in zip(*kept.values(), strict=True))
    digests = torch.frombuffer(bytearray(b"".join(kept)), dtype=torch.uint8).view(-1, DIGEST_BYTES)
    data = save({"digests": digests, "codes": codes, "states": states})
    try:
        atomic_write(place, lambda aside: aside.write_bytes(hashlib.sha256(data).digest() + data))
    except OSError as error:
        tqdm.write(f"what was coded is not kept for the next search: {error}", file=sys.stderr)
