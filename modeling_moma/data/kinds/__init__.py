# SPDX-License-Identifier: Apache-2.0
"""The kinds of sources, a file each, told apart by the columns that a recipe names."""

import importlib
import pkgutil

from .audio import AudioKind
from .base import KINDS, SourceKind, read_kind, source_kind
from .captions import Alternative, CaptionKind
from .images import ImageKind
from .interleaved import InterleavedKind
from .text import TextKind


# a new file is a new kind
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_module.name}", __name__)

__all__ = [
    "KINDS",
    "Alternative",
    "AudioKind",
    "CaptionKind",
    "ImageKind",
    "InterleavedKind",
    "SourceKind",
    "TextKind",
    "read_kind",
    "source_kind",
]
