# SPDX-License-Identifier: Apache-2.0
"""The image tokenizer as two ONNX graphs, from pixels to codes and from codes to pixels.

Shape suffixes:
    B images, C channels, H rows and W columns of pixels, S codes of an image.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tokenization import MomaVQModel
from tokenization.image_tokenizers_moma import LibraryImageTokenizer

from ..errors_moma import InputError
from ..utils.atomic_files import write_folder_aside
from ..utils.errors import MissingExtraError


# packages that `torch.onnx` imports beside torch
_NEEDED = ("onnx", "onnxscript")


class OnnxImageTokenizer(NamedTuple):
    """Files of [`export_image_tokenizer`].

    Attributes:
        encoder (`Path`):
            `pixel_values` fp32 `[B, C, H, W]` in [-1, 1] to `image_tokens` int64 `[B, S]`.
        decoder (`Path`, *optional*):
            `image_tokens` to `pixel_values`; `None` where the model has no decoder.
    """

    encoder: Path
    decoder: Path | None


class _Encoder(nn.Module):
    def __init__(self, model: MomaVQModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_tokens(pixel_values)


class _Decoder(nn.Module):
    def __init__(self, model: MomaVQModel):
        super().__init__()
        self.model = model

    def forward(self, image_tokens: torch.Tensor) -> torch.Tensor:
        return self.model.decode_image_tokens(image_tokens)


def export_image_tokenizer(model: MomaVQModel, folder: str | Path) -> OnnxImageTokenizer:
    """Write `encoder.onnx` and `decoder.onnx`, for any number of images of the model's resolution.

    The graphs hold the weights. They check nothing: a code outside the codebook raises in the runtime, but -1 is
    read as the last code.

    Args:
        model (`MomaVQModel`):
            in fp32, on the CPU; `processor.vq_model` of a [`MomaProcessor`].
        folder (`str` or `Path`):
            where to write; made if it is missing.

    Returns:
        `OnnxImageTokenizer`: the paths of the files.

    Raises:
        ImportError: `onnx` or `onnxscript` is missing.
        TypeError: the model is one of Transformers, or no image tokenizer.
        ValueError: the model's weights are not fp32 or not on the CPU, or `folder` is a file.
    """
    if isinstance(model, LibraryImageTokenizer):
        raise TypeError(
            f"`model` is the {type(model.model).__name__} of Transformers: only a MomaVQModel is exported here."
        )
    if not isinstance(model, MomaVQModel):
        raise TypeError(f"`model` is a {type(model).__name__}: give `processor.vq_model`, a MomaVQModel.")
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f'export to ONNX needs {" and ".join(missing)}: pip install "modeling-moma[export]"')
    if model.dtype != torch.float32:
        raise InputError(
            f"`model` is in {model.dtype}, in which near codes would change places: convert it by `model.float()`."
        )
    if model.device.type != "cpu":
        raise InputError(f"`model` is on {str(model.device)!r}: export takes it from the CPU, `model.cpu()`.")
    config, folder = model.config, Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"`folder` is {str(folder)!r}, a file: name a folder for the files of the export.")
    was_training = model.training
    try:
        pixels_BCHW = torch.zeros(2, config.in_channels, config.resolution, config.resolution)
        programs = {"encoder": _program(_Encoder(model), "pixel_values", pixels_BCHW, "image_tokens")}
        if model.decoder is not None:
            codes_BS = torch.zeros(2, (config.resolution // config.downsample_factor) ** 2, dtype=torch.long)
            programs["decoder"] = _program(_Decoder(model), "image_tokens", codes_BS, "pixel_values")
    finally:
        model.train(was_training)

    # both graphs are written aside before either replaces an earlier one
    def write(aside: Path):
        aside.mkdir()
        for name, program in programs.items():
            program.save(aside / f"{name}.onnx", external_data=False)
        if "decoder" not in programs:
            (folder / "decoder.onnx").unlink(missing_ok=True)

    write_folder_aside(folder, write)
    paths = {name: folder / f"{name}.onnx" for name in programs}
    return OnnxImageTokenizer(paths["encoder"], paths.get("decoder"))


def _program(module: nn.Module, input_name: str, example: torch.Tensor, output_name: str) -> Any:
    with torch.no_grad():
        return torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            verbose=False,
            input_names=[input_name],
            output_names=[output_name],
            dynamic_shapes=({0: torch.export.Dim("images", min=1)},),
        )
