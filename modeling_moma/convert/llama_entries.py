# SPDX-License-Identifier: Apache-2.0
"""How each tensor of a MoMa comes about from a text model of the Llama family."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedConfig

from ..configuration_moma import MomaConfig
from .embedding_rows import extend_rows
from .reading import TensorSource
from .transfer import EMBEDDING, HEAD, Entry, decoder_entries


class BuiltWeights(Mapping):
    """Tensors of the target by name, each made of the source's when it is asked for."""

    def __init__(self, source: TensorSource, entries: Mapping[str, Entry], dtype: torch.dtype | None = None):
        self.source, self.entries, self.dtype = source, entries, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.entries[name].made(self.source)
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
) -> dict[str, Entry]:
    """Return an entry for every tensor of the target."""
    entries = decoder_entries(config)
    for place, name in enumerate((EMBEDDING, HEAD)):
        if name in entries:
            entries[name].build = functools.partial(_extend, entries[name].shape[0], new_ids, seed, place)
            entries[name].source_shape = (source.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        bias = f"model.layers.{layer}.self_attn.o_proj.bias"
        if source.model_type == "qwen2":
            entries[bias].source, entries[bias].build = None, functools.partial(torch.zeros, config.hidden_size)
        if image_group == "new":
            for part, projection in enumerate(("gate_proj", "up_proj", "down_proj")):
                entry = entries[f"model.layers.{layer}.mlp.groups.image.mlp.{projection}.weight"]
                # the first two places are those of the embedding and the head
                draw = functools.partial(_draw, entry.shape, config.initializer_range, seed, 2 + 3 * layer + part)
                entry.source, entry.build = None, draw
    return entries


def _extend(num_rows: int, new_ids: list[int], seed: int, place: int, old: torch.Tensor) -> torch.Tensor:
    # the same rows however often they are built
    return extend_rows(old, num_rows, new_ids, _generator(seed, place))


def set_code_rows(entry: Entry, code_ids: Sequence[int], row_CD: torch.Tensor) -> None:
    """Let an entry come with other rows for the image codes."""
    extend = entry.build

    def build(old: torch.Tensor) -> torch.Tensor:
        result = extend(old)
        result[torch.tensor(code_ids)] = row_CD.to(result.dtype)
        return result

    entry.build = build


def _generator(seed: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed << 20) + place)


def _draw(shape: tuple[int, ...], std: float, seed: int, place: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(seed, place)) * std
