# SPDX-License-Identifier: Apache-2.0
"""Image tokenizers of other models in Transformers, with the methods that the processor calls of a MomaVQModel."""

import os
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import maybe_autocast

from .modeling_moma_vq import MomaVQModel, without_tf32
from .processor_errors_moma import InputError


# Pixels in one pass: those models have feature maps of many channels at full size.
_PASS_PIXELS = 2**20
# Where the weights of the image tokenizer lie in a checkpoint of the whole model.
_WHOLE_PREFIX = {r"^(model\.)?vqmodel\.": ""}


def _encode_janus(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    return model.encode(pixel_values).image_tokens.view(pixel_values.shape[0], -1)


def _decode_janus(model: Any, codes_BHW: torch.Tensor) -> torch.Tensor:
    # the grid of the library's class is square until it is set
    model.quantize.quant_state_dims = list(codes_BHW.shape[1:])
    return model.decode(codes_BHW.flatten(1))


def _encode_emu3(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    sizes = torch.tensor(pixel_values.shape[-2:]).expand(pixel_values.shape[0], 2)
    return torch.stack(list(model.encode(pixel_values, sizes).image_tokens)).flatten(1)


@dataclass(frozen=True)
class LibraryClass:
    """A class of Transformers that turns images into codes and back.

    Args:
        name (`str`):
            of the class in `transformers`.
        whole (`str`):
            `model_type` of the model that it is a part of.
        codebook_size (`str`):
            field of its configuration with the number of codes.
        encode (`Callable`):
            model and pixel values `(B, 3, height, width)` in [-1, 1] to codes `(B, rows * columns)`.
        decode (`Callable`):
            model and codes `(B, rows, columns)` to pixel values.
    """

    name: str
    whole: str
    codebook_size: str
    encode: Callable[[Any, torch.Tensor], torch.Tensor]
    decode: Callable[[Any, torch.Tensor], torch.Tensor]


# by `model_type`
LIBRARY_CLASSES = {
    "janus_vqgan": LibraryClass("JanusVQVAE", "janus", "num_embeddings", _encode_janus, _decode_janus),
    "emu3_vqgan": LibraryClass(
        "Emu3VQVAE", "emu3", "codebook_size", _encode_emu3, lambda model, codes_BHW: model.decode(codes_BHW)
    ),
}
MODEL_TYPES = ("moma_vq", *LIBRARY_CLASSES, *(entry.whole for entry in LIBRARY_CLASSES.values()))


class LibraryImageTokenizer(nn.Module):
    """An image tokenizer of Transformers as a [`MomaProcessor`] uses it.

    Codes and pixels are those of the library's class, which stays as it is in `model`.
    """

    def __init__(self, model: PreTrainedModel, image_size: tuple[int, int]):
        super().__init__()
        self.kind = library_class(model)
        self.model = model.eval()
        self.image_size = image_size
        factor = pixels_per_code(model.config)
        if min(image_size) < factor or any(side % factor for side in image_size):
            raise InputError(
                f"image_processor: images of {image_size[0]}x{image_size[1]} pixels cannot be tokenised by "
                f"{type(model).__name__}: height and width must be multiples of {factor}."
            )
        self.grid = (image_size[0] // factor, image_size[1] // factor)

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the library's class."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def quantize(self) -> Any:
        """The quantiser; the vectors of the codes are its `embedding.weight`, `(codebook_size, embed_dim)`."""
        return self.model.quantize

    @torch.no_grad()
    def get_image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images as codes."""
        if tuple(pixel_values.shape[-2:]) != self.image_size or pixel_values.ndim != 4:
            raise InputError(
                f"pixel_values must have shape (batch_size, 3, {self.image_size[0]}, {self.image_size[1]}), got "
                f"{tuple(pixel_values.shape)}."
            )
        device_type = pixel_values.device.type
        with maybe_autocast(device_type, enabled=False), without_tf32() if device_type == "cuda" else nullcontext():
            return torch.cat([self.kind.encode(self.model, part) for part in self._parts(pixel_values)])

    @torch.no_grad()
    def decode_image_tokens(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """Decode codes as images.

        Args:
            image_tokens (`torch.LongTensor` of shape `(batch_size, rows * columns)`):
                Codes in raster order.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, 3, height, width)`, in [-1, 1].
        """
        parts = self._parts(image_tokens.long().unflatten(1, self.grid))
        return torch.cat([self.kind.decode(self.model, part).clamp(-1, 1) for part in parts])

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the library's model, as it would be saved alone."""
        self.model.save_pretrained(save_directory, **kwargs)

    def _parts(self, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return batch.split(max(1, _PASS_PIXELS // (self.image_size[0] * self.image_size[1])))


def library_class(model: Any) -> LibraryClass:
    """Return what is known of a model's class."""
    config = getattr(model, "config", None)
    kind = LIBRARY_CLASSES.get(getattr(config, "model_type", ""))
    if kind is not None and hasattr(model, "quantize"):
        return kind
    raise TypeError(f"vq_model: {type(model).__name__} {why_no_image_tokenizer(getattr(config, 'model_type', None))}.")


def why_no_image_tokenizer(model_type: str | None) -> str:
    """Return what a model of a type lacks to be an image tokenizer, as the end of a sentence about it."""
    known = ", ".join(["MomaVQModel", *(entry.name for entry in LIBRARY_CLASSES.values())])
    if model_type in ("chameleon", "chameleon_vqgan"):
        return (
            "has no decoder in Transformers: `moma convert` makes a MomaVQModel of it, with `--vqgan` its decoder too"
        )
    whole = {entry.whole: entry.name for entry in LIBRARY_CLASSES.values()}
    if model_type in whole:
        return f"is a whole model: its image tokenizer is the {whole[model_type]} in it, `model.model.vqmodel`"
    return f"gives no codes of a codebook that could be decoded again; an image tokenizer is one of {known}"


def pixels_per_code(config: Any) -> int:
    """Return the side of the square of pixels that one code stands for."""
    if config.model_type not in LIBRARY_CLASSES:
        return config.downsample_factor
    return 2 ** (len(config.channel_multiplier) - 1)


def own_image_size(config: Any) -> tuple[int, int] | None:
    """Return the size of image that an image tokenizer is made for, height and width in pixels."""
    side = getattr(config, "resolution", None)
    if side is None and hasattr(config, "num_patches"):
        side = config.num_patches * pixels_per_code(config)
    return None if side is None else (side, side)


def number_of_codes(config: Any) -> int:
    """Return the number of codes of an image tokenizer's configuration."""
    kind = LIBRARY_CLASSES.get(config.model_type)
    return config.num_embeddings if kind is None else getattr(config, kind.codebook_size)


def load_image_tokenizer(place: str | os.PathLike, subfolder: str = "", **kwargs: Any) -> Any:
    """Load an image tokenizer of any known class; its `config.json` says which.

    A folder or repository of a whole Janus or Emu3 is read for its image tokenizer alone.
    """
    hub_kwargs = {name: value for name, value in kwargs.items() if name != "dtype"}
    settings = PreTrainedConfig.get_config_dict(place, subfolder=subfolder, **hub_kwargs)[0]
    model_type = settings.get("model_type", "moma_vq")
    if model_type == "moma_vq":
        both: Any = MomaVQModel.from_pretrained(place, subfolder=subfolder, output_loading_info=True, **kwargs)
        model, loaded = both
        _refuse_missing(place, subfolder, "MomaVQModel", loaded["missing_keys"], "was config.json changed?")
        return model
    for name, entry in LIBRARY_CLASSES.items():
        if model_type not in (name, entry.whole):
            continue
        library = getattr(transformers, entry.name)
        if model_type == entry.whole:
            kwargs["config"] = library.config_class.from_dict(settings.get("vq_config", {}))
            kwargs["key_mapping"] = _WHOLE_PREFIX
        model, loaded = library.from_pretrained(place, subfolder=subfolder, output_loading_info=True, **kwargs)
        cause = f"is this a checkpoint of {entry.whole} in the layout of Transformers?"
        _refuse_missing(place, subfolder, entry.name, loaded["missing_keys"], cause)
        return model.eval()
    raise TypeError(f"{place}: a model of type {model_type!r} {why_no_image_tokenizer(model_type)}.")


def _refuse_missing(place: Any, subfolder: str, name: str, keys: Collection[str], cause: str) -> None:
    if keys:
        where = os.path.join(place, subfolder)
        raise InputError(f"{where}: {len(keys)} weights of {name} are missing, such as {min(keys)!r}; {cause}")
