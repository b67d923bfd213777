# SPDX-License-Identifier: Apache-2.0
"""Codecs: modalities beside text and images bring a class that turns items into codes and back."""

import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from huggingface_hub import snapshot_download
from transformers.processing_utils import (
    AudioKwargs,
    ImagesKwargs,
    ProcessingKwargs,
    ProcessorChatTemplateKwargs,
    TextKwargs,
)

from .processor_errors_moma import InputError
from .text_tokenizer_moma import check_modality


# The folder of a codec lies directly in the processor's: `push_to_hub` of Transformers uploads no deeper ones.
SUBFOLDER = "{}_codec"
CODECS: dict[str, type] = {}
_REQUIRED_MEMBERS = ("num_codes", "length", "encode", "decode", "save_pretrained", "from_pretrained")
_DOWNLOAD_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# Names that the processor's call uses for arguments of its own.
_ARGUMENTS = (AudioKwargs, ImagesKwargs, ProcessingKwargs, ProcessorChatTemplateKwargs, TextKwargs)
_RESERVED_NAMES = {"image", "images", "videos", "chat_template", "return_labels"}.union(
    *(kind.__optional_keys__ for kind in _ARGUMENTS)
)
_Codec = TypeVar("_Codec", bound=type)


class ModalityCodec(Protocol):
    """The attributes and methods of a codec; no base class is needed.

    [`register_codec`] gives it the name by which a saved processor finds it again.

    Attributes:
        num_codes (`int`):
            Number of different codes.
        length (`int`, *optional*):
            Codes of one item; `None` where it varies.
    """

    num_codes: int
    length: int | None

    def encode(self, items: list) -> list[list[int]]:
        """Turn items into codes."""
        ...

    def decode(self, codes: list[int]) -> Any:
        """Turn the codes of one item into that item."""

    def save_pretrained(self, folder: str):
        """Write the codec into a folder of its own: files, and no folders."""

    @classmethod
    def from_pretrained(cls, folder: str) -> "ModalityCodec":
        """Read what `save_pretrained` has written."""
        ...


def register_codec(name: str) -> Callable[[_Codec], _Codec]:
    """Register a codec class under a name, which a saved processor keeps.

    Args:
        name (`str`):
            The name.

    Returns:
        `Callable[[type], type]`: a class decorator, which also sets `codec_type` to the name.

    Raises:
        ValueError: another class has the name already.
    """

    def register(codec_class: _Codec) -> _Codec:
        known = CODECS.get(name)
        # a reloaded module registers a new class of the same name
        if known is not None and known.__qualname__ != codec_class.__qualname__:
            raise InputError(f"name: {name!r} is already the codec {known.__qualname__}; choose another.")
        CODECS[name] = codec_class
        codec_class.codec_type = name  # pyright: ignore[reportAttributeAccessIssue]
        return codec_class

    return register


def check_codec(modality: str, codec: Any):
    """Check the name and the members of a codec."""
    check_modality(modality)
    if modality in _RESERVED_NAMES:
        raise InputError(
            f"codecs: {modality!r} is not free, the processor takes something else by it; choose another."
        )
    missing = [name for name in _REQUIRED_MEMBERS if not hasattr(codec, name)]
    if missing:
        raise TypeError(f"codecs[{modality!r}]: {type(codec).__name__} is no codec, it lacks {', '.join(missing)}.")


def codec_types(codecs: dict[str, ModalityCodec], needs_names: bool = False) -> dict[str, str | None]:
    """Return the registered name of each codec, `None` for one that has none, unless a saved processor needs it."""
    types = {modality: getattr(codec, "codec_type", None) for modality, codec in codecs.items()}
    for modality in [modality for modality, name in types.items() if needs_names and name is None]:
        raise InputError(
            f"codecs[{modality!r}]: {type(codecs[modality]).__name__} has no name to be loaded by; put "
            "`@register_codec(name)` above the class."
        )
    return types


def save_codecs(codecs: dict[str, ModalityCodec], folder: "str | os.PathLike"):
    """Write each codec into the subfolder `{modality}_codec`."""
    codec_types(codecs, needs_names=True)
    for modality, codec in codecs.items():
        target = os.path.join(folder, SUBFOLDER.format(modality))
        os.makedirs(target, exist_ok=True)
        codec.save_pretrained(target)


def load_codecs(types: dict[str, str], repository: str | os.PathLike, subfolder: str = "", **hub_kwargs: Any) -> dict:
    """Read the codecs of a saved processor."""
    for modality, name in types.items():
        check_modality(modality)
        if name not in CODECS:
            raise InputError(
                f"codecs: the processor's {modality} codec {name!r} is none of {sorted(CODECS)}; import the module "
                f"that registers it, or pass `codecs={{{modality!r}: codec}}`."
            )
    if types and not os.path.isdir(repository):
        hub_kwargs = {key: value for key, value in hub_kwargs.items() if key in _DOWNLOAD_KWARGS}
        patterns = [os.path.join(subfolder, SUBFOLDER.format(modality), "*") for modality in types]
        repository = snapshot_download(str(repository), allow_patterns=patterns, **hub_kwargs)
    return {
        modality: CODECS[name].from_pretrained(os.path.join(repository, subfolder, SUBFOLDER.format(modality)))
        for modality, name in types.items()
    }
