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
from .reading import CheckpointError, TensorSource


ROWS_AT_ONCE = 4096
# fields of a model that attends otherwise than plainly, and their values in one that does not
ATTENTION_FIELDS = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "attention.sliding_window": (0,),
}


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor of the file: its name there, its shape as Transformers counts dimensions, and where and how it lies."""

    name: str
    shape: tuple[int, ...]
    quantization: Any
    offset: int
    stored_shape: tuple[int, ...]
    stored_type: np.dtype


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

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors, by name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    @functools.cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Types of the tensors, by name; what is quantised is read in fp32."""
        return dict.fromkeys(self._tensors, torch.float32)

    @functools.cached_property
    def files(self) -> dict[str, Path]:
        """The file of each tensor, by name."""
        return dict.fromkeys(self._tensors, self.path)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """See [`TensorSource.read`]; the whole tensor is dequantized for any rows."""
        from gguf import dequantize

        tensor = self._tensors[name]
        count = math.prod(tensor.stored_shape)
        # read and not mapped: pages of the file would count as this process's memory
        stored = np.fromfile(self.path, tensor.stored_type, count, offset=tensor.offset).reshape(tensor.stored_shape)
        values = np.empty(self.shapes[name], dtype=np.float32)
        if values.ndim == 1:
            # a stored vector is bytes without rows
            values[:] = dequantize(stored, tensor.quantization)
        else:
            # dequantizing takes several times the memory of its result
            for start in range(0, len(values), ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                values[part] = dequantize(stored[part], tensor.quantization)
        values = self._processor.process(values, tensor.name).weights
        return torch.from_numpy(np.ascontiguousarray(values if rows is None else values[rows]))

    @functools.cached_property
    def _processor(self) -> TensorProcessor:
        return TENSOR_PROCESSORS.get(self._contents[0], TensorProcessor)(config=self.config)

    @functools.cached_property
    def _contents(self) -> tuple[str, list["_StoredTensor"], dict[str, Any]]:
        """The architecture, where each tensor lies, and those of `ATTENTION_FIELDS` that the file has."""
        from gguf import GGUFReader

        # the reader is not kept: it holds every token of the vocabulary as a separate array
        reader = GGUFReader(self.path)
        field: Any = reader.get_field("general.architecture")
        architecture = field.contents()
        attention: dict[str, Any] = {name: reader.get_field(f"{architecture}.{name}") for name in ATTENTION_FIELDS}
        tensors = [
            _StoredTensor(
                name=tensor.name,
                shape=tuple(map(int, reversed(tensor.shape))),
                quantization=tensor.tensor_type,
                offset=int(tensor.data_offset),
                stored_shape=tuple(tensor.data.shape),
                stored_type=tensor.data.dtype,
            )
            for tensor in reader.tensors
        ]
        return architecture, tensors, {name: field.contents() for name, field in attention.items() if field}

    def _check_attention(self):
        architecture, _, attention = self._contents
        read = GGUF_TO_TRANSFORMERS_MAPPING["config"].get(architecture, {})
        for name, value in attention.items():
            if name not in read and value not in ATTENTION_FIELDS[name]:
                raise CheckpointError(
                    f"{self.path}: Transformers passes over `{architecture}.{name}`, which is {value!r}, so what it "
                    "makes of this file attends otherwise. Convert the checkpoint that the file was made of."
                )

    @functools.cached_property
    def _tensors(self) -> dict[str, "_StoredTensor"]:
        self._check_attention()
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(self.source_config)
        try:
            names = get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        tensors = self._contents[1]
        unknown = [tensor.name for tensor in tensors if tensor.name not in names]
        if unknown:
            raise CheckpointError(
                f"{self.path}: Transformers passes over {unknown[0]!r} and {len(unknown) - 1} other tensors, so what "
                "it makes of this file is another model. Convert the checkpoint that the file was made of."
            )
        return {names[tensor.name]: tensor for tensor in tensors}
