# SPDX-License-Identifier: Apache-2.0
"""Writing a MoMa checkpoint out of the tensors of another model, one tensor at a time."""

import copy
import fnmatch
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging
from transformers.utils.hub import convert_file_size_to_int

from ..configuration_moma import MomaConfig
from ..errors_moma import InputError
from ..modeling_moma import MomaForCausalLM
from ..utils.atomic_files import LEFT_OVER, check_writable, write_folder_aside
from .reading import DTYPES, CheckpointError, CheckpointReader, LazyWeights, TensorSource, read_json


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
# names of the layer norms here, and in the sources
_LAYER_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
RECEIPT_FILE = "conversion.json"
# bound of the relative difference of logits in fp32 on a probe batch, and the batch's sizes
LARGEST_DIFFERENCE = 1e-3
NUM_ROWS, ROW_LENGTH, NUM_PADDED = 2, 16, 5
# of weights that a model computes with
WRITTEN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as it is."""
    return tensor


@dataclass
class Entry:
    """How one tensor of the target comes about: of the source's tensor `source`, or of none, by `build`.

    The source has the target's shape but where `source_shape` says another.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None
    build: Callable[..., torch.Tensor] = unchanged
    source_shape: tuple[int, ...] | None = None

    def made(self, reader: TensorSource) -> torch.Tensor:
        """Return the tensor of the target."""
        return self.build() if self.source is None else self.build(reader[self.source])


def decoder_entries(config: MomaConfig) -> dict[str, Entry]:
    """Return an entry for each tensor of a 1t1i: a decoder of Transformers has them all, some by other names."""
    model, entries = _empty_model(config), {}
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            source = re.sub(r"mlp\.groups\.\w+\.mlp", "mlp", name)
            for ours, theirs in _LAYER_NORMS.items():
                source = source.replace(ours, theirs)
            entries[name] = Entry(name, tuple(tensor.shape), source)
    return entries


def _empty_model(config: MomaConfig) -> MomaForCausalLM:
    with torch.device("meta"):
        return MomaForCausalLM(config)


@dataclass
class Receipt:
    """The account of one conversion."""

    source: str
    model_type: str
    taken: int = 0
    copied: int = 0
    new: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    tensor_bytes: int = 0
    files: int = 0
    relative_difference: float | None = None
    new_token_probability: float | None = None
    image_loss: float | None = None

    def table(self) -> str:
        """Return the report as lines of `name  value`."""
        difference = self.relative_difference
        rows = [
            ("source", f"{self.source} ({self.model_type})"),
            ("keys taken", self.taken),
            ("keys copied", self.copied),
            ("keys new", self.new),
            *[(f"keys not in the model: {reason}", count) for reason, count in self.ignored.items()],
            ("size", f"{self.tensor_bytes / 1e6:.1f} MB in {self.files} file{'s' if self.files != 1 else ''}"),
            ("relative output difference", "not measured" if difference is None else f"{difference:.1e}"),
        ]
        if self.new_token_probability is not None:
            rows.append(("probability of new tokens", f"{self.new_token_probability:.2%}"))
        if self.image_loss is not None:
            rows.append(("loss of image codes", f"{self.image_loss:.2f} nats"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def transfer(
    reader: TensorSource,
    config: MomaConfig,
    entries: Collection[Entry],
    output: str | Path,
    *,
    ignored: Mapping[str, str] | None = None,
    max_shard_size: int | str = "2GB",
    dtype: torch.dtype | None = None,
    source_config: PreTrainedConfig | None = None,
    extras: Callable[[Path], object] | None = None,
    probe: Callable[[CheckpointReader], Mapping[str, float]] | None = None,
) -> Receipt:
    """Write a folder that `MomaForCausalLM.from_pretrained` loads.

    All keys and shapes are checked before the first tensor is read. Then each tensor goes to the disk as soon as it is
    made; no more than its source and itself are in memory. Everything is written into a hidden folder, `config.json`
    last, and becomes the output as in [`write_folder_aside`]: whenever the process is killed, no half-written folder
    loads. The hidden folder, `.{name}.{machine}-{process}.partial`, is this process's own and lies beside the output,
    or in it where it is there already; those of processes of this machine that are no more are cleared away.
    """
    output = Path(output).absolute()
    check_dtype(dtype)
    check_free(output)
    report = check_source(reader, entries, ignored or {})
    generation_config = convert_generation_config(reader.folder, config, source_config)
    plan = _plan_tensors(reader, entries, dtype)
    shards = split_torch_state_dict_into_shards(plan, max_shard_size=convert_file_size_to_int(max_shard_size))
    report.tensor_bytes, report.files = shards.metadata["total_size"], len(shards.filename_to_tensors)

    def write(aside: Path) -> None:
        aside.mkdir()
        if extras is not None:
            extras(aside)
        _write_weights(reader, {entry.name: entry for entry in entries}, plan, shards, aside)
        if probe is not None:
            measured = probe(CheckpointReader(aside))
            _check_difference(measured["relative_difference"], reader)
            vars(report).update(measured)
        (aside / RECEIPT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        generation_config.save_pretrained(aside)
        written = copy.deepcopy(config)
        written.architectures = [MomaForCausalLM.__name__]
        sizes = Counter()
        for tensor in plan.values():
            sizes[tensor.dtype] += tensor.nbytes
        written.dtype = sizes.most_common(1)[0][0]
        custom_object_save(_empty_model(config), aside, config=written)  # pyright: ignore[reportArgumentType]
        written.save_pretrained(aside)
        # a second conversion may have been faster
        check_free(output)

    write_folder_aside(output, write)
    return report


def convert_generation_config(
    folder: Path, config: MomaConfig, source: PreTrainedConfig | None = None
) -> GenerationConfig:
    """Keep how the source generates, with the padding and beginning tokens of the MoMa, and its end token added."""
    path = folder / "generation_config.json"
    has_own = bool(read_json(path, default={}))
    try:
        if has_own:
            generation_config = GenerationConfig.from_pretrained(folder)
        else:
            generation_config = GenerationConfig.from_model_config(source or config)
        # chat models stop at several tokens
        stops = []
        for ids in (generation_config.eos_token_id, source.eos_token_id if source else None, config.eos_token_id):
            stops += [ids] if isinstance(ids, int) else ids or []
        stops = list(dict.fromkeys(stops))
        generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
        # the ids of released files may disagree with the vocabulary
        generation_config.pad_token_id = config.pad_token_id
        generation_config.bos_token_id = config.bos_token_id
        # saving checks as strictly
        generation_config.validate(strict=True)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: Transformers cannot use it: {error}") from error
    return generation_config


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


def check_source(reader: TensorSource, entries: Collection[Entry], ignored: Mapping[str, str]) -> Receipt:
    """Compare the keys and shapes of a source with what the entries need, and count them."""
    used = Counter(entry.source for entry in entries if entry.source is not None)
    for entry in entries:
        key, shape = entry.source, entry.source_shape or entry.shape
        if key is None:
            continue
        stored = reader.names.get(key)
        if stored is None:
            raise CheckpointError(f"{reader.folder}: it lacks the key {key!r}, of the shape {shape}.")
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.path}: {key!r} has the shape {stored.shape}, but by config.json it is {shape}."
            )
    reasons = Counter()
    for key, stored in reader.names.items():
        if key in used:
            continue
        reason = next((why for pattern, why in ignored.items() if fnmatch.fnmatchcase(key, pattern)), None)
        if reason is None:
            raise CheckpointError(
                f"{stored.path}: nothing takes the key {key!r}, of the shape {stored.shape}: by config.json the model "
                "has no such weight."
            )
        reasons[reason] += 1
    return Receipt(
        source=reader.label,
        model_type=reader.config.get("model_type", ""),
        taken=len(used),
        copied=used.total() - len(used),
        new=len(entries) - used.total(),
        ignored=dict(reasons),
    )


def check_tied_head(reader: TensorSource, config: MomaConfig) -> None:
    """Check that a head which the source has beside its embedding may be left out of a target that ties them."""
    if config.tie_word_embeddings and {EMBEDDING, HEAD} <= reader.keys():
        if not torch.equal(reader[EMBEDDING], reader[HEAD]):
            raise CheckpointError(
                f"{reader.names[HEAD].path}: {HEAD!r} differs from the embedding, but config.json has "
                "`tie_word_embeddings` = True. Set it to False there if the head is right, or remove the key."
            )


def rounded_weights(weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> Mapping[str, torch.Tensor]:
    """Return weights in the type that a conversion writes, so that a probe shows its errors, not the rounding."""

    def rounded(name: str) -> torch.Tensor:
        tensor = weights[name]
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return weights if dtype is None else LazyWeights(weights.keys(), rounded)


def streamed_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, weights: Mapping[str, torch.Tensor]
) -> Any:
    """Return a model in eval mode that computes in fp32 and holds the weights of one module at a time."""
    # buffers that are not saved, as rotary frequencies, have to be real
    with init_empty_weights(include_buffers=False):
        model = model_class(config).float()
    tied = model.all_tied_weights_keys
    attach_align_device_hook(
        model.eval(),
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=LazyWeights({*weights, *tied}, lambda name: weights[tied.get(name, name)]),
        offload_buffers=True,
    )
    return model


@torch.no_grad()
def probe_logits(
    token_ids: list[int], *models: tuple[type[PreTrainedModel], PreTrainedConfig, Mapping[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """Return each model's logits of a probe batch of these ids, one row of which is padded on the left."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(token_ids), (NUM_ROWS, ROW_LENGTH), generator=generator)
    attention_mask = torch.ones_like(picks)
    attention_mask[0, :NUM_PADDED] = 0
    logits = []
    for kind, config, weights in models:
        model = streamed_model(kind, config, weights)
        states = model.model(torch.tensor(token_ids)[picks], attention_mask=attention_mask, use_cache=False)
        # Chameleon's own forward masks the logits of images
        logits.append(model.lm_head(states.last_hidden_state)[attention_mask.bool()])
    return logits


def relative_difference(source: torch.Tensor, converted: torch.Tensor) -> float:
    """Return `max |a - b| / max |a|` of the source's logits `a` and the converted model's logits `b`."""
    difference = (source.float() - converted.float()).abs().max()
    return float(difference / source.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _plan_tensors(
    reader: TensorSource, entries: Collection[Entry], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return the tensors of the target without their data."""
    source_sizes = Counter()
    for stored in reader.names.values():
        if stored.dtype.is_floating_point:
            source_sizes[stored.dtype] += math.prod(stored.shape)
    default = source_sizes.most_common(1)[0][0] if source_sizes else torch.float32
    plan = {}
    for entry in entries:
        own = default if entry.source is None else reader.names[entry.source].dtype
        written = dtype if dtype is not None and own.is_floating_point else own
        if written not in WRITTEN_DTYPES:
            hint = "; `--dtype bfloat16` writes another one" if own.is_floating_point else ""
            raise CheckpointError(
                f"{reader.folder}: {entry.source!r} is in {own}, a type of no model{hint}. Is the checkpoint "
                "quantised without saying so?"
            )
        plan[entry.name] = torch.empty(entry.shape, dtype=written, device="meta")
    return plan


def _write_weights(
    reader: TensorSource,
    entries: Mapping[str, Entry],
    plan: Mapping[str, torch.Tensor],
    shards: StateDictSplit,
    folder: Path,
) -> None:
    # one progress bar in bytes for all files: tensors differ much in size
    with logging.tqdm(total=shards.metadata["total_size"], desc="tensors", unit="B", unit_scale=True) as progress:
        for file_name, names in shards.filename_to_tensors.items():
            # wide types first, so that each tensor lies at a multiple of its item size
            names = sorted(names, key=lambda name: -plan[name].itemsize)
            header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
            stop = 0
            for name in names:
                start, stop = stop, stop + plan[name].nbytes
                kind = DTYPE_NAMES[plan[name].dtype]
                header[name] = {"dtype": kind, "shape": list(plan[name].shape), "data_offsets": [start, stop]}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            with (folder / file_name).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    tensor = entries[name].made(reader).to(plan[name].dtype).contiguous()
                    if tensor.shape != plan[name].shape:
                        raise CheckpointError(f"{name!r}: it came out as {tuple(tensor.shape)}.")
                    if tensor.numel():
                        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                    progress.update(tensor.nbytes)
                    # free this tensor before the next one is read
                    del tensor
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": dict(sorted(shards.tensor_to_filename.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
