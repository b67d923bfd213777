# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint folder of Transformers: names and shapes without the data, then one tensor at a time."""

import functools
import json
import math
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import ADAPTER_CONFIG_NAME

from ..errors_moma import InputError
from ..utils.messages import one_line


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointError(InputError):
    """A checkpoint that cannot be read or converted. The message names the file, key or field at fault."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: where it lies there, and what it is."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0


class LazyWeights(Mapping):
    """Weights by name, each made when it is asked for."""

    def __init__(self, names: Collection[str], make: Callable[[str], torch.Tensor]):
        self.names, self.make = names, make

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class TensorSource(LazyWeights):
    """The tensors of a checkpoint, by name; each one is read when it is asked for."""

    config: Mapping[str, Any]
    names: Mapping[str, Stored]

    def __init__(self, folder: Path):
        self.folder, self.label = folder, folder.resolve().name
        self.loading: dict[str, str] = {}


class CheckpointReader(TensorSource):
    """The tensors of a checkpoint folder, by name; each one is read from the disk when it is asked for.

    Opening reads the headers alone and checks that the files are complete and agree with the index. No file stays
    mapped or open, so that the memory in use is that of the tensors that the caller holds.
    """

    def __init__(self, folder: str | Path, allow_pickle: bool = False):
        super().__init__(Path(folder))
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{folder}: no such folder. Fetch a checkpoint of the Hub with `hf download NAME --local-dir FOLDER`."
            )
        # `from_pretrained` would load them over the weights
        if (self.folder / ADAPTER_CONFIG_NAME).is_file():
            raise CheckpointError(
                f"{folder}: it holds adapters ({ADAPTER_CONFIG_NAME}) beside its weights. Merge them first, by PEFT's "
                "`merge_and_unload`, or remove them to convert the weights alone."
            )
        self.names: dict[str, Stored] = {}
        self._pickle: tuple[Path, dict] | None = None
        if self._exists("model.safetensors"):
            self._open("model.safetensors", self._open_shard)
        elif self._exists("pytorch_model.bin"):
            self._open("pytorch_model.bin", self._open_pickle, allow_pickle)
        else:
            other = sorted(path.name for path in self.folder.glob("*.gguf"))
            hint = f" It holds {other[0]}: `moma convert llama` reads it with --gguf-file {other[0]}." if other else ""
            raise CheckpointError(
                f"{folder}: it holds neither model.safetensors nor model.safetensors.index.json with its shards.{hint}"
            )

    @functools.cached_property
    def config(self) -> dict:
        """The checkpoint's `config.json`."""
        return read_json(self.folder / "config.json")

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self.names[name]
        if stored.path.suffix != ".safetensors":
            return self._unpickled(stored.path)[name].clone()
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        buffer = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            if len(buffer) and file.readinto(buffer) != len(buffer):
                raise CheckpointError(f"{stored.path}: it ends within the tensor {name!r}. Fetch the file again.")
        return tensor

    def _exists(self, name: str) -> bool:
        return (self.folder / name).is_file() or (self.folder / f"{name}.index.json").is_file()

    def _open(self, name: str, open_shard: Callable[[Path], None], allowed: bool = True) -> None:
        # Transformers prefers the single file, too
        if (self.folder / name).is_file():
            shards, weight_map = [name], None
        else:
            name = f"{name}.index.json"
            weight_map = read_json(self.folder / name).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
                raise CheckpointError(f"{self.folder / name}: it has no `weight_map` of keys to file names.")
            shards = sorted(set(weight_map.values()))
        if not allowed:
            raise CheckpointError(
                f"{self.folder / shards[0]}: a pickle, which can run code when it is read, and there are no "
                "safetensors files. Pass --allow-pickle (allow_pickle=True) if you trust its author."
            )
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(f"{self.folder / name}: the shard {shard!r} lies outside the folder.")
            if not (self.folder / shard).is_file():
                missing = [key for key, place in (weight_map or {}).items() if place == shard]
                raise CheckpointError(
                    f"{self.folder / shard}: this shard is missing; by the index it holds {missing[0]!r} and "
                    f"{len(missing) - 1} other tensors."
                )
            open_shard(self.folder / shard)
        if weight_map is not None:
            self._compare_with_index(weight_map, self.folder / name)

    def _compare_with_index(self, weight_map: dict[str, str], index: Path) -> None:
        for key, shard in weight_map.items():
            if key not in self.names or self.names[key].path.name != shard:
                raise CheckpointError(f"{index}: by the index {key!r} lies in {shard}, but that file has no such key.")
        for key, stored in self.names.items():
            if key not in weight_map:
                raise CheckpointError(f"{stored.path}: it holds {key!r}, which the index {index.name} does not list.")

    def _add(self, key: str, stored: Stored) -> None:
        if key in self.names:
            raise CheckpointError(f"{stored.path}: it holds {key!r}, as does {self.names[key].path.name}.")
        self.names[key] = stored

    def _open_shard(self, path: Path) -> None:
        try:
            # NumPy's, since torch maps the whole file, for which there may be no memory
            with safe_open(path, framework="np") as file:
                parts = {key: file.get_slice(key) for key in file.offset_keys()}
                found = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in parts.items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: no safetensors file, or one that is cut short or damaged ({error}). Fetch it again."
            ) from error
        # the library takes no file whose tensors do not follow one another up to its end
        start = path.stat().st_size
        for key, (shape, dtype) in reversed(found.items()):
            if dtype not in DTYPES:
                raise CheckpointError(f"{path}: {key!r} is of the type {dtype}, and only {list(DTYPES)} are read.")
            start -= math.prod(shape) * DTYPES[dtype].itemsize
            self._add(key, Stored(path, shape, DTYPES[dtype], start))

    def _open_pickle(self, path: Path) -> None:
        for key, tensor in read_pickle(path, map_location="meta").items():
            self._add(key, Stored(path, tuple(tensor.shape), tensor.dtype))

    def _unpickled(self, path: Path) -> dict[str, torch.Tensor]:
        if self._pickle is None or self._pickle[0] != path:
            # free the previous tensor before the next one is read
            self._pickle = None
            self._pickle = (path, read_pickle(path))
        return self._pickle[1]


def read_json(path: Path, default: dict | None = None) -> dict:
    """Read a JSON object."""
    if default is not None and not path.is_file():
        return default
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; the folder is not a whole checkpoint.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not a JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def read_pickle(path: Path, map_location: str = "cpu") -> dict[str, torch.Tensor]:
    """Read tensors by name from a file of `torch.save`, bare or under `"state_dict"`.

    Tensors and plain containers are read (`torch.load(weights_only=True)`), and no code of the file is run.
    """
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: it holds more than tensors and plain containers, or is damaged. Objects of a training, such as "
            "callbacks, are not read even if pickles are allowed. Where the training code is installed, save the "
            'state_dict alone: torch.save(torch.load(path, weights_only=False)["state_dict"], new_path).'
        ) from error
    # its reader raises errors of any type
    except Exception as error:
        told = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{path}: truncated, damaged or no PyTorch file ({told}).") from error
    tensors = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(f"{path}: it holds no tensors by name, bare or under 'state_dict'.")
    return dict(tensors)
