# SPDX-License-Identifier: Apache-2.0
"""The kinds of sources, told apart by the columns that a recipe names."""

from .base import KINDS, Shard, SourceKind, Template, read_kind, source_kind
from .captions import Alternative, AudioDocuments, AudioKind, CaptionDocuments, CaptionKind, ImageKind
from .interleaved import InterleavedKind, TextKind


__all__ = [
    "KINDS",
    "Alternative",
    "AudioDocuments",
    "AudioKind",
    "CaptionDocuments",
    "CaptionKind",
    "ImageKind",
    "InterleavedKind",
    "Shard",
    "SourceKind",
    "Template",
    "TextKind",
    "read_kind",
    "source_kind",
]
