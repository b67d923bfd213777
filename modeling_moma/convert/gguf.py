# SPDX-License-Identifier: Apache-2.0
"""The tensors of a GGUF file by the names of Transformers, dequantized one at a time."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_TO_TRANSFORMERS_MAPPING,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.utils import is_gguf_available

from ..utils.errors import MissingExtraError
from ..utils.messages import one_line
from .reading import CheckpointError, Stored, TensorSource


ROWS_AT_ONCE = 4096
# fields of a model that attends otherwise than plainly, and their values in one that does not
ATTENTION_FIELDS = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "attention.sliding_window": (0,),
}


@dataclass(frozen=True)
class _Quantized(Stored):
    """A tensor of the file under its name there; its shape is as Transformers counts dimensions."""

    name: str = ""
    quantization: Any = None
    stored_shape: tuple[int, ...] = ()
    stored_type: np.dtype = np.dtype(np.uint8)


class GgufReader(TensorSource):
    """The tensors of a GGUF file as Transformers reads it.

    Transformers' own tables of names and rearrangements are used, but a tensor is dequantized when it is asked for,
    where `from_pretrained(gguf_file=...)` holds the whole model. All come as float32.
    """

    def __init__(self, folder: str | Path, file: str):
        super().__init__(Path(folder))
        self.path, self.label, self.loading = self.folder / file, Path(file).name, {"gguf_file": file}
        if not self.path.is_file():
            found = sorted(path.name for path in self.folder.glob("*.gguf")) if self.folder.is_dir() else []
            raise CheckpointError(f"{self.path}: no such file; of this kind the folder has {found or 'none'}.")
        if not is_gguf_available():
            raise MissingExtraError(f'{self.path}: to read it needs gguf: pip install "modeling-moma[gguf]"')
        try:
            self.source_config: PreTrainedConfig = AutoConfig.from_pretrained(self.folder, **self.loading)
        # the library raises errors of any type for damaged files
        except Exception as error:
            reason = one_line(error)
            raise CheckpointError(f"{self.path}: Transformers cannot read it: {reason}") from error

    @functools.cached_property
    def config(self) -> dict:
        """The configuration that Transformers reads from the file."""
        return self.source_config.to_dict()

    def __getitem__(self, name: str) -> torch.Tensor:
        from gguf import dequantize

        tensor = self.names[name]
        count = math.prod(tensor.stored_shape)
        # read and not mapped: pages of the file would count as this process's memory
        stored = np.fromfile(self.path, tensor.stored_type, count, offset=tensor.start).reshape(tensor.stored_shape)
        values = np.empty(tensor.shape, dtype=np.float32)
        if values.ndim == 1:
            # a stored vector is bytes without rows
            values[:] = dequantize(stored, tensor.quantization)
        else:
            # dequantizing takes several times the memory of its result
            for start in range(0, len(values), ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                values[part] = dequantize(stored[part], tensor.quantization)
        return torch.from_numpy(np.ascontiguousarray(self._processor.process(values, tensor.name).weights))

    @functools.cached_property
    def _processor(self) -> TensorProcessor:
        return TENSOR_PROCESSORS.get(self._contents[0], TensorProcessor)(config=self.config)

    @functools.cached_property
    def _contents(self) -> tuple[str, list[_Quantized]]:
        """The architecture, and where each tensor lies."""
        from gguf import GGUFReader

        # the reader is not kept: it holds every token of the vocabulary as a separate array
        reader = GGUFReader(self.path)
        field: Any = reader.get_field("general.architecture")
        architecture = field.contents()
        read = GGUF_TO_TRANSFORMERS_MAPPING["config"].get(architecture, {})
        for name, plain in ATTENTION_FIELDS.items():
            field = reader.get_field(f"{architecture}.{name}")
            if field and name not in read and field.contents() not in plain:
                raise CheckpointError(
                    f"{self.path}: Transformers passes over `{architecture}.{name}`, which is {field.contents()!r}, "
                    "so what it makes of the file attends otherwise. Convert the checkpoint that the file was made of."
                )
        return architecture, [
            _Quantized(
                self.path,
                shape=tuple(map(int, reversed(tensor.shape))),
                dtype=torch.float32,
                start=int(tensor.data_offset),
                name=tensor.name,
                quantization=tensor.tensor_type,
                stored_shape=tuple(tensor.data.shape),
                stored_type=tensor.data.dtype,
            )
            for tensor in reader.tensors
        ]

    @functools.cached_property
    def names(self) -> dict[str, _Quantized]:
        """The tensors by their names in Transformers."""
        _, tensors = self._contents
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(self.source_config)
        try:
            names = get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        unknown = [tensor.name for tensor in tensors if tensor.name not in names]
        if unknown:
            raise CheckpointError(
                f"{self.path}: Transformers passes over {unknown[0]!r} and {len(unknown) - 1} other tensors, so what "
                "it makes of this file is another model. Convert the checkpoint that the file was made of."
            )
        return {names[tensor.name]: tensor for tensor in tensors}
