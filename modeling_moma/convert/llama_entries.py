# SPDX-License-Identifier: Apache-2.0
"""How each tensor of a MoMa comes about from a text model of the Llama family."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedConfig

from ..configuration_moma import MomaConfig
from .embedding_rows import extend_rows
from .reading import TensorSource
from .transfer import EMBEDDING, HEAD, Entry


class BuiltWeights(Mapping):
    """Tensors of the target by name, each made of the source's when it is asked for."""

    def __init__(self, source: TensorSource, entries: Sequence[Entry], dtype: torch.dtype | None = None):
        self.source, self.dtype = source, dtype
        self.entries = {entry.name: entry for entry in entries}

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        tensor = entry.build(*(self.source.read(key) for key in entry.sources))
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def ignored_keys(config: MomaConfig) -> dict[str, str]:
    """Return the patterns of keys of the source that the target has no parameter for, with the reasons."""
    ignored = {"model.layers.*.self_attn.rotary_emb.inv_freq": "rotary frequencies, computed anew"}
    if config.tie_word_embeddings:
        ignored[HEAD] = "the head, tied to the embedding"
    return ignored


def llama_entries(
    config: MomaConfig, source: PreTrainedConfig, new_ids: list[int], image_group: str, seed: int
) -> list[Entry]:
    """Return an entry for every tensor of the target."""
    width = config.hidden_size
    names = [EMBEDDING] if config.tie_word_embeddings else [EMBEDDING, HEAD]
    entries = []
    for offset, name in enumerate(names):
        extend = functools.partial(_extend, num_rows=config.vocab_size, new_ids=new_ids, seed=seed, place=offset)
        shapes = ((source.vocab_size, width),)
        entries.append(Entry(name, (config.vocab_size, width), (name,), extend, source_shapes=shapes))
    entries.append(Entry("model.norm.weight", (width,), ("model.norm.weight",)))
    for layer in range(config.num_hidden_layers):
        entries += _attention_entries(config, source, f"model.layers.{layer}.")
        entries += _feed_forward_entries(config, layer, image_group, seed)
    return entries


def _extend(old: torch.Tensor, num_rows: int, new_ids: list[int], seed: int, place: int) -> torch.Tensor:
    # the same rows however often they are built
    return extend_rows(old, num_rows, new_ids, _generator(seed, place))


def with_code_rows(entries: Sequence[Entry], name: str, code_ids: Sequence[int], row_CD: torch.Tensor) -> list[Entry]:
    """Return the entries, one of them with other rows for the image codes."""

    def build(extend: Callable[..., torch.Tensor], *sources: torch.Tensor) -> torch.Tensor:
        result = extend(*sources)
        result[torch.tensor(code_ids)] = row_CD.to(result.dtype)
        return result

    return [
        dataclasses.replace(entry, build=functools.partial(build, entry.build)) if entry.name == name else entry
        for entry in entries
    ]


def _attention_entries(config: MomaConfig, source: PreTrainedConfig, layer: str) -> list[Entry]:
    width = config.hidden_size
    query_width, key_width = (
        heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    entries = [
        Entry(f"{layer}attention_norm.weight", (width,), (f"{layer}input_layernorm.weight",)),
        Entry(f"{layer}ffn_norm.weight", (width,), (f"{layer}post_attention_layernorm.weight",)),
    ]
    shapes = {
        "q_proj": (query_width, width),
        "k_proj": (key_width, width),
        "v_proj": (key_width, width),
        "o_proj": (width, query_width),
    }
    for projection, shape in shapes.items():
        name = f"{layer}self_attn.{projection}."
        entries.append(Entry(f"{name}weight", shape, (f"{name}weight",)))
        if not config.attention_bias:
            continue
        if projection == "o_proj" and source.model_type == "qwen2":
            zeros = functools.partial(torch.zeros, shape[0])
            entries.append(Entry(f"{name}bias", shape[:1], build=zeros, kind="new"))
        else:
            entries.append(Entry(f"{name}bias", shape[:1], (f"{name}bias",)))
    if config.qk_norm == "rmsnorm":
        for norm in ("q_norm", "k_norm"):
            name = f"{layer}self_attn.{norm}.weight"
            entries.append(Entry(name, (config.head_dim,), (name,)))
    return entries


def _feed_forward_entries(config: MomaConfig, layer: int, image_group: str, seed: int) -> list[Entry]:
    wide, narrow = (config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size)
    entries = []
    for place, (projection, shape) in enumerate({"gate_proj": wide, "up_proj": wide, "down_proj": narrow}.items()):
        source_name = f"model.layers.{layer}.mlp.{projection}.weight"
        text, image = (
            f"model.layers.{layer}.mlp.groups.{group}.mlp.{projection}.weight" for group in ("text", "image")
        )
        entries.append(Entry(text, shape, (source_name,)))
        if image_group == "copy":
            entries.append(Entry(image, shape, (source_name,), kind="copied"))
        else:
            # the first two places are those of the embedding and the head
            draw = functools.partial(_draw, shape, config.initializer_range, seed, 2 + 3 * layer + place)
            entries.append(Entry(image, shape, build=draw, kind="new"))
    return entries


def _generator(seed: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 20) + place)


def _draw(shape: tuple[int, ...], std: float, seed: int, place: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(seed, place)) * std
