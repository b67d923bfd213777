# SPDX-License-Identifier: Apache-2.0
"""Writing a MoMa checkpoint out of the tensors of another model, one tensor at a time."""

import copy
import fnmatch
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging
from transformers.utils.hub import convert_file_size_to_int

from ..configuration_moma import MomaConfig
from ..errors_moma import InputError
from ..modeling_moma import MomaForCausalLM
from ..utils.atomic_files import LEFT_OVER, check_writable, write_folder_aside
from .embedding_rows import ROWS_AT_ONCE
from .output_comparison import LARGEST_DIFFERENCE, ProbeResult
from .reading import DTYPES, CheckpointError, CheckpointReader, TensorSource
from .report import Receipt


# fields with the same name in `MomaConfig` and in decoder configurations of Transformers
SAME_NAMED_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "tie_word_embeddings",
)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# keys of a MoMa, and of its sources
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# of weights that a model computes with
WRITTEN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as it is."""
    return tensor


@dataclass
class Entry:
    """How one tensor of the target comes about.

    Args:
        name (`str`):
            its key in `MomaForCausalLM`.
        shape (`tuple[int, ...]`):
            its shape.
        sources (`tuple[str, ...]`, *optional*, defaults to `()`):
            keys of the source that it needs.
        build (`Callable`, *optional*, defaults to `unchanged`):
            makes it of these tensors.
        kind (`Literal["taken", "copied", "new"]`, *optional*, defaults to `"taken"`):
            `"taken"` (a tensor of the source, as it is or rearranged), `"copied"` (a further copy of one that another
            entry takes) or `"new"`.
        source_shapes (`tuple[tuple[int, ...], ...]`, *optional*):
            shapes that the sources must have; by default that of the target.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    build: Callable[..., torch.Tensor] = unchanged
    kind: Literal["taken", "copied", "new"] = "taken"
    source_shapes: tuple[tuple[int, ...], ...] | None = None


# an entry and the type in which it is written
TypedEntry = tuple[Entry, torch.dtype]


def transfer(
    reader: TensorSource,
    config: MomaConfig,
    entries: Sequence[Entry],
    output: str | Path,
    *,
    ignored: Mapping[str, str] | None = None,
    max_shard_size: int | str = "2GB",
    dtype: torch.dtype | None = None,
    generation_config: GenerationConfig | None = None,
    extras: Callable[[Path], object] | None = None,
    probe: Callable[[CheckpointReader], ProbeResult] | None = None,
) -> Receipt:
    """Write a folder that `MomaForCausalLM.from_pretrained` loads.

    All keys and shapes are checked before the first tensor is read. Then each tensor goes to the disk as soon as it is
    made; no more than its sources and itself are in memory. Everything is written into a hidden folder, `config.json`
    last, and becomes the output as in [`write_folder_aside`]: whenever the process is killed, no half-written folder
    loads. The hidden folder, `.{name}.{machine}-{process}.partial`, is this process's own and lies beside the output,
    or in it where it is there already; those of processes of this machine that are no more are cleared away.
    """
    output = Path(output).absolute()
    check_dtype(dtype)
    check_free(output)
    with torch.device("meta"):
        model = MomaForCausalLM(config)
    _check_target(model, entries)
    report = check_source(reader, entries, ignored or {})
    typed = _with_dtypes(reader, entries, dtype)
    shards = _plan_shards(typed, convert_file_size_to_int(max_shard_size))
    report.tensor_bytes = sum(_num_bytes(entry, dtype) for entry, dtype in typed)
    report.files = len(shards)

    def write(aside: Path) -> None:
        aside.mkdir()
        if extras is not None:
            extras(aside)
        _write_weights(reader, shards, aside, report.tensor_bytes)
        if probe is not None:
            result = probe(CheckpointReader(aside))
            report.relative_difference = result.relative_difference
            report.new_token_probability = result.new_token_probability
            report.image_loss = result.image_loss
            _check_difference(report.relative_difference, reader)
        report.save(aside)
        (generation_config or GenerationConfig.from_model_config(config)).save_pretrained(aside)
        written = copy.deepcopy(config)
        written.architectures = [type(model).__name__]
        written.dtype = _main_dtype(typed)
        custom_object_save(model, aside, config=written)  # pyright: ignore[reportArgumentType]
        written.save_pretrained(aside)
        # a second conversion may have been faster
        check_free(output)

    write_folder_aside(output, write)
    return report


def check_free(output: Path) -> None:
    """Raise `CheckpointError` where a folder holds something but what is written aside, or cannot be written into."""
    is_taken = output.exists() and not output.is_dir()
    if is_taken or any(not path.name.endswith(LEFT_OVER) for path in output.glob("*")):
        raise CheckpointError(f"{output}: it exists and is not empty; choose another output folder.")
    try:
        check_writable(output)
    except InputError as error:
        raise CheckpointError(str(error)) from error


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise `CheckpointError` at what is none of `WRITTEN_DTYPES`; the name of a type is none, either."""
    if dtype is not None and dtype not in WRITTEN_DTYPES:
        raise CheckpointError(f"`dtype` = {dtype!r}: it must be one of {WRITTEN_DTYPES}, or None for the source's.")


def _check_difference(difference: float, reader: TensorSource) -> None:
    # a NaN has to fail as well
    if not difference <= LARGEST_DIFFERENCE:
        raise CheckpointError(
            f"{reader.folder}: on a probe batch the outputs of the converted model differ from the source's by "
            f"{difference:.1e} of the largest, where {LARGEST_DIFFERENCE:.0e} is allowed; nothing is kept. The "
            "checkpoint has a feature that the conversion does not know, or holds NaN."
        )


def _check_target(model: MomaForCausalLM, entries: Sequence[Entry]) -> None:
    tied = model._tied_weights_keys if model.config.tie_word_embeddings else {}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    for name, count in Counter(entry.name for entry in entries).items():
        if name not in expected:
            raise CheckpointError(f"{name!r}: the MoMa model of this config has no such key.")
        if count > 1:
            raise CheckpointError(f"{name!r}: this key of the MoMa model is given {count} times.")
    shapes = {entry.name: tuple(entry.shape) for entry in entries}
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(f"{name!r}: nothing is given for this key of the MoMa model.")
        if shapes[name] != shape:
            raise CheckpointError(f"{name!r}: the shape {shapes[name]} is given, but the MoMa model has {shape}.")


def check_source(reader: TensorSource, entries: Sequence[Entry], ignored: Mapping[str, str]) -> Receipt:
    """Compare the keys and shapes of a source with what the entries need, and count them."""
    used = set()
    for entry in entries:
        shapes = entry.source_shapes or (tuple(entry.shape),) * len(entry.sources)
        for key, shape in zip(entry.sources, shapes, strict=True):
            if key not in reader.shapes:
                raise CheckpointError(f"{reader.folder}: it lacks the key {key!r}, of the shape {tuple(shape)}.")
            if reader.shapes[key] != tuple(shape):
                raise CheckpointError(
                    f"{reader.files[key]}: {key!r} has the shape {reader.shapes[key]}, but by config.json it is "
                    f"{tuple(shape)}."
                )
            used.add(key)
    reasons = Counter()
    for key in reader:
        if key in used:
            continue
        reason = next((why for pattern, why in ignored.items() if fnmatch.fnmatchcase(key, pattern)), None)
        if reason is None:
            raise CheckpointError(
                f"{reader.files[key]}: nothing takes the key {key!r}, of the shape {reader.shapes[key]}: by "
                "config.json the model has no such weight."
            )
        reasons[reason] += 1
    kinds = Counter(entry.kind for entry in entries)
    return Receipt(
        source=reader.label,
        model_type=reader.config.get("model_type", ""),
        taken=kinds["taken"],
        copied=kinds["copied"],
        new=kinds["new"],
        ignored=dict(reasons),
    )


def check_tied_head(reader: TensorSource, config: MomaConfig) -> None:
    """Check that a head which the source has beside its embedding may be left out of a target that ties them."""
    if not config.tie_word_embeddings or not {EMBEDDING, HEAD} <= reader.shapes.keys():
        return
    for start in range(0, reader.shapes[EMBEDDING][0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        if not torch.equal(reader.read(EMBEDDING, rows), reader.read(HEAD, rows)):
            raise CheckpointError(
                f"{reader.files[HEAD]}: {HEAD!r} differs from the embedding, but config.json has "
                "`tie_word_embeddings` = True. Set it to False there if the head is right, or remove the key."
            )


def _with_dtypes(reader: TensorSource, entries: Sequence[Entry], dtype: torch.dtype | None) -> list[TypedEntry]:
    source_sizes = Counter()
    for key in reader:
        if reader.dtypes[key].is_floating_point:
            source_sizes[reader.dtypes[key]] += math.prod(reader.shapes[key])
    default = source_sizes.most_common(1)[0][0] if source_sizes else torch.float32
    typed = []
    for entry in entries:
        own = reader.dtypes[entry.sources[0]] if entry.sources else default
        written = dtype if dtype is not None and own.is_floating_point else own
        if written not in WRITTEN_DTYPES:
            hint = "; `--dtype bfloat16` writes another one" if own.is_floating_point else ""
            raise CheckpointError(
                f"{reader.folder}: {entry.sources[0]!r} is in {own}, a type of no model{hint}. Is the checkpoint "
                "quantised without saying so?"
            )
        typed.append((entry, written))
    return typed


def _main_dtype(typed: list[TypedEntry]) -> torch.dtype:
    sizes = Counter()
    for entry, dtype in typed:
        sizes[dtype] += _num_bytes(entry, dtype)
    return sizes.most_common(1)[0][0]


def _num_bytes(entry: Entry, dtype: torch.dtype) -> int:
    return math.prod(entry.shape) * dtype.itemsize


def _plan_shards(typed: list[TypedEntry], max_bytes: int) -> list[list[TypedEntry]]:
    shards, bytes_left = [], 0
    for entry, dtype in typed:
        size = _num_bytes(entry, dtype)
        if not shards or size > bytes_left:
            shards.append([])
            bytes_left = max_bytes
        shards[-1].append((entry, dtype))
        bytes_left -= size
    return shards


def _write_weights(reader: TensorSource, shards: list[list[TypedEntry]], folder: Path, total_bytes: int) -> None:
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    # one progress bar in bytes for all files: tensors differ much in size
    with logging.tqdm(total=total_bytes, desc="tensors", unit="B", unit_scale=True) as progress:
        for name, shard in zip(names, shards):
            _write_shard(reader, shard, folder / name, progress.update)
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards) for entry, _ in shard}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(reader: TensorSource, shard: list[TypedEntry], path: Path, wrote: Callable[[int], object]) -> None:
    # wide types first, so that each tensor lies at a multiple of its item size
    shard = sorted(shard, key=lambda pair: -pair[1].itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry, dtype in shard:
        stop = offset + _num_bytes(entry, dtype)
        header[entry.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, dtype in shard:
            tensor = entry.build(*(reader.read(key) for key in entry.sources)).to(dtype).contiguous()
            if tensor.shape != tuple(entry.shape):
                raise CheckpointError(f"{entry.name!r}: it came out as {tuple(tensor.shape)}, not {entry.shape}.")
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            wrote(_num_bytes(entry, dtype))
            # free this tensor before the next one is read
            del tensor
