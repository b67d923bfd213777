# SPDX-License-Identifier: Apache-2.0
"""The original `vqgan.ckpt` layout of taming-transformers and Chameleon, with its decoder, to a MomaVQModel folder."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file

from tokenization import MomaVQConfig, MomaVQModel

from ..utils.atomic_files import write_folder_aside
from ..utils.messages import one_line
from .reading import CheckpointError, read_pickle
from .transfer import check_free


# the discriminator and the perceptual network of training, which no image passes at inference
IGNORED_PREFIX = "loss."
DECODER_PREFIX = "decoder."
# of images that a code book was ever trained for, with room
MOST_RESOLUTION = 2**14
# sizes of the configuration read off shapes: field, parameter, axis
_SIZES = (
    ("base_channels", "encoder.conv_in.weight", 0),
    ("in_channels", "encoder.conv_in.weight", 1),
    ("latent_channels", "quant_conv.weight", 1),
    ("embed_dim", "quantize.embedding.weight", 1),
    ("num_embeddings", "quantize.embedding.weight", 0),
)


def read_vqgan(path: str | Path, *, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """Read the tensors of an image tokenizer in the original layout, without those of its training losses."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error}).") from error
    elif allow_pickle:
        tensors = read_pickle(path)
    else:
        raise CheckpointError(
            f"{path}: a pickle can run any code when it is read. If you trust its origin, allow it with "
            "--allow-pickle; or save its tensors as safetensors."
        )
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(IGNORED_PREFIX)}
    if not any(name.startswith("encoder.") for name in tensors):
        raise CheckpointError(
            f"{path}: it holds no 'encoder.' tensors, so it is no VQ-GAN; found {sorted(tensors)[:3]}."
        )
    return tensors


def vqgan_config(tensors: Mapping[str, torch.Tensor], resolution: int = 512) -> MomaVQConfig:
    """Return the configuration that the tensors' names and shapes tell."""
    fields: dict[str, Any] = {field: _size(tensors, name, axis) for field, name, axis in _SIZES}
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    widths = [_size(tensors, f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)]
    with_attention = [level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in tensors]
    if not 0 < resolution <= MOST_RESOLUTION:
        raise CheckpointError(f"--resolution {resolution}: pixels of a side, {MOST_RESOLUTION} at most.")
    if empty := [name for field, name, _ in _SIZES if not fields[field]]:
        raise CheckpointError(f"{empty[0]}: it has no rows, so this is no image tokenizer.")
    try:
        return MomaVQConfig(
            **fields,
            channel_multiplier=[width // fields["base_channels"] for width in widths],
            num_res_blocks=_count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
            attn_resolutions=[resolution // 2**level for level in with_attention] or None,
            attn_type="vanilla" if "encoder.mid.attn_1.q.weight" in tensors else None,
            resolution=resolution,
        )
    except (ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"The sizes of the tensors fit no MomaVQConfig: {error}") from error


def _size(tensors: Mapping[str, torch.Tensor], name: str, axis: int) -> int:
    if name not in tensors or tensors[name].ndim <= axis:
        raise CheckpointError(f"{name}: missing, so this is not the layout of taming-transformers.")
    return tensors[name].shape[axis]


def _count(tensors: Mapping[str, torch.Tensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)


def load_vq_model(tensors: Mapping[str, torch.Tensor], config: MomaVQConfig) -> MomaVQModel:
    """Return a model that holds exactly these tensors."""
    with torch.device("meta"):
        model = MomaVQModel(config)
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"The image tokenizer does not fit its configuration: {one_line(error)}") from error
    if odd := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise CheckpointError(f"{odd[0]}: it holds {tensors[odd[0]].dtype}, which are no weights of a VQ-GAN.")
    if odd := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{odd[0]}: it holds NaN or infinity: damaged, or of a training that diverged.")
    return model.eval()


def has_decoder(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether there are decoder tensors among these."""
    return any(name.startswith(DECODER_PREFIX) for name in tensors)


def convert_vqgan(
    path: str | Path,
    output: str | Path,
    *,
    allow_pickle: bool = False,
    resolution: int = 512,
    config: MomaVQConfig | None = None,
) -> MomaVQModel:
    """Write a `vqgan.ckpt` as a folder that `MomaVQModel.from_pretrained` loads."""
    check_free(Path(output).absolute())
    tensors = read_vqgan(path, allow_pickle=allow_pickle)
    model = load_vq_model(tensors, config if config is not None else vqgan_config(tensors, resolution))
    write_folder_aside(output, model.save_pretrained)
    return model
