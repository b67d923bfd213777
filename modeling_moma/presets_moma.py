# SPDX-License-Identifier: Apache-2.0
"""Named sizes of the model: the rows of the paper's Table 1, each with any of its layouts of experts."""

from dataclasses import dataclass

from .errors_moma import InputError


@dataclass(frozen=True)
class PresetSize:
    """One size of Table 1.

    Attributes:
        num_layers (`int`): decoder layers.
        hidden_size (`int`): width of the residual stream.
        ffn_size (`int`): inner width of a feed-forward network of two matrices.
        num_heads (`int`): attention heads.
        has_depth (`bool`): whether every other layer, from the first on, is a depth layer.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    has_depth: bool = False

    def fields(self) -> dict:
        """The fields of [`MomaConfig`] that this size sets."""
        fields: dict[str, int | list[int]] = {
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            # SwiGLU keeps the matrices' total of a two-matrix FFN; the paper's counts need it unrounded
            "intermediate_size": 2 * self.ffn_size // 3,
            "num_attention_heads": self.num_heads,
        }
        if self.has_depth:
            fields["depth_layers"] = list(range(0, self.num_layers, 2))
        return fields


PRESET_SIZES = {
    "90m": PresetSize(num_layers=8, hidden_size=512, ffn_size=2048, num_heads=8),
    "435m": PresetSize(num_layers=24, hidden_size=1024, ffn_size=4096, num_heads=16),
    "1.4b": PresetSize(num_layers=24, hidden_size=2048, ffn_size=8192, num_heads=16),
    "mod-110m": PresetSize(num_layers=14, hidden_size=512, ffn_size=2048, num_heads=8, has_depth=True),
    "mod-635m": PresetSize(num_layers=40, hidden_size=1024, ffn_size=4096, num_heads=16, has_depth=True),
    "mod-2.3b": PresetSize(num_layers=32, hidden_size=2304, ffn_size=9216, num_heads=18, has_depth=True),
}
# `num_experts` by the end of a preset's name
PRESET_EXPERTS = {
    "dense": 1,
    "1t1i": {"text": 1, "image": 1},
    "8x": 8,
    "4t4i": {"text": 4, "image": 4},
}


def preset_names() -> list[str]:
    """Every size with every layout of experts."""
    return [f"moma-{size}-{experts}" for size in PRESET_SIZES for experts in PRESET_EXPERTS]


def preset_fields(name: str) -> dict:
    """The fields of [`MomaConfig`] that a preset sets.

    Args:
        name (`str`): one of `preset_names()`, in any case.

    Raises:
        ValueError: the name is not a preset.
    """
    if name.lower() not in preset_names():
        raise InputError(f"`name` must be one of {preset_names()}, got {name!r}.")
    size, experts = name.lower().removeprefix("moma-").rsplit("-", 1)
    return {**PRESET_SIZES[size].fields(), "num_experts": PRESET_EXPERTS[experts]}


__all__ = ["PRESET_EXPERTS", "PRESET_SIZES", "PresetSize", "preset_fields", "preset_names"]
