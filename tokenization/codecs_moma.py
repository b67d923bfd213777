# SPDX-License-Identifier: Apache-2.0
"""Codecs: what turns the items of a modality other than text and pictures into codes, and codes into items."""

import os
from typing import Any, Protocol

from huggingface_hub import snapshot_download

from .processor_errors_moma import InputError
from .text_tokenizer_moma import check_modality


# one folder deep, since `push_to_hub` of Transformers goes no deeper
SUBFOLDER = "{}_codec"
CODECS: dict[str, type] = {}
_MEMBERS = ("num_codes", "length", "encode", "decode", "save_pretrained", "from_pretrained")
_DOWNLOAD_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# names of arguments that the processor's call has already
_TAKEN = ("image", "images", "videos")


class ModalityCodec(Protocol):
    """
    What a codec has to have; no base class is needed. [`register_codec`] gives it the name by which a saved processor
    finds it again.

    Attributes:
        num_codes (`int`): number of different codes.
        length (`int`, *optional*): codes of one item; `None` where it varies.
    """

    num_codes: int
    length: int | None

    def encode(self, items: list) -> list[list[int]]:
        """
        Turns items into codes.

        Args:
            items (`list`):
                Whatever the codec takes: arrays, paths.

        Returns:
            `list[list[int]]`: for each item its codes in `[0, num_codes)`, one at least.
        """
        ...

    def decode(self, codes: list[int]) -> Any:
        """
        Turns the codes of one item into that item.

        Args:
            codes (`list[int]`):
                Codes in `[0, num_codes)`.
        """

    def save_pretrained(self, folder: str):
        """
        Writes the codec into a folder of its own: files, and no folders.

        Args:
            folder (`str`):
                The folder, which exists.
        """

    @classmethod
    def from_pretrained(cls, folder: str) -> "ModalityCodec":
        """
        Reads what `save_pretrained` has written.

        Args:
            folder (`str`):
                The folder.
        """
        ...


def register_codec(name: str):
    """
    Makes a class of codecs known by a name, which a saved processor keeps.

    Args:
        name (`str`):
            The name.

    Returns:
        A decorator of classes, which changes nothing else about them.

    Raises:
        ValueError: if another class has the name.
    """

    def register(codec_class: type) -> type:
        known = CODECS.get(name)
        # a module that is loaded again makes its classes anew
        if known is not None and known.__qualname__ != codec_class.__qualname__:
            raise InputError(f"name: {name!r} is already the codec {known.__qualname__}; choose another.")
        CODECS[name] = codec_class
        codec_class.codec_type = name
        return codec_class

    return register


def check_codec(modality: str, codec: Any):
    """Raise `ValueError` for a name that no codec can have, and `TypeError` for what is no codec."""
    check_modality(modality)
    if modality in _TAKEN:
        raise InputError(f"codecs: {modality!r} is not free, pictures go through the VQ model; choose another name.")
    missing = [name for name in _MEMBERS if not hasattr(codec, name)]
    if missing:
        raise TypeError(f"codecs[{modality!r}]: {type(codec).__name__} is no codec, it lacks {', '.join(missing)}.")


def codec_types(codecs: dict[str, ModalityCodec]) -> dict[str, str | None]:
    """The registered name of each codec, `None` for one that has none."""
    return {modality: getattr(codec, "codec_type", None) for modality, codec in codecs.items()}


def save_codecs(codecs: dict[str, ModalityCodec], folder: "str | os.PathLike"):
    """
    Writes each codec into the subfolder `{modality}_codec`.

    Raises:
        ValueError: if a codec has no name by which it could be found again.
    """
    for modality, name in codec_types(codecs).items():
        if name is None:
            raise InputError(
                f"codecs[{modality!r}]: {type(codecs[modality]).__name__} has no name to be loaded by; put "
                "`@register_codec(name)` above the class."
            )
        target = os.path.join(folder, SUBFOLDER.format(modality))
        os.makedirs(target, exist_ok=True)
        codecs[modality].save_pretrained(target)


def load_codecs(types: dict[str, str], repository: str | os.PathLike, subfolder: str = "", **hub_kwargs: Any) -> dict:
    """
    Reads the codecs of a saved processor.

    Args:
        types (`dict[str, str]`):
            Name of the codec of each modality.
        repository (`str` or `os.PathLike`):
            Folder or Hub name of the processor.
        subfolder (`str`, *optional*, defaults to `""`):
            Where in it the processor is.
        hub_kwargs:
            Arguments of downloads, such as `revision`.

    Returns:
        `dict[str, ModalityCodec]`: by modality.

    Raises:
        ValueError: if a name is not registered.
    """
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


__all__ = ["CODECS", "ModalityCodec", "register_codec"]
