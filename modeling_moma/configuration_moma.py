# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""MoMa model configuration: every size and switch, what contradicts what, presets, counts of parameters.

The rules of routing are known here by their records, see [`RoutingRule`]: the modules above enter them.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import auto_docstring

from .compat_moma import AUTO_MAP
from .errors_moma import InputError
from .frames_moma import FRAME_FIELDS, IMAGE, TEXT, ModalityFrame, problem_of_name
from .parallel_plans_moma import expert_parallel_plan, tensor_parallel_plan


DEPTH_LAYER_TYPE = "moma_depth"
# fields of saved configurations that are no more, and the value that all models now have
REMOVED_FIELDS = {"cover_all_tokens": False, "depth_pool": "batch", "depth_threshold_momentum": 0.5}


@dataclass
class RoutingRule:
    """A rule by which experts, depth layers and tokens choose one another.

    Entered with its function for experts by [`routing_rule`], and where depth layers may follow it, with another one
    by [`depth_rule`].
    """

    name: str
    select: Callable
    is_causal: bool
    may_train: bool
    takes_noise: bool = False
    moves_bias: bool = False
    counts_experts: bool = False
    reads_threshold: bool = False
    needs_auxiliary: bool = False
    choose: Callable | None = None

    def experts_per_token(self, config: "MomaConfig", group: str) -> float:
        """Return the experts of a group that one of its tokens meets on average."""
        return config.num_experts_per_tok if self.counts_experts else config.group_capacity_factor(group)


# rules by name, filled by the routing module; while it is not imported, configurations take any name
RULES: dict[str, RoutingRule] = {}


def rule_names(**properties: bool) -> tuple[str, ...]:
    """Return the names of the rules with these properties, such as `is_causal=True`."""
    return tuple(
        name for name, rule in RULES.items() if all(getattr(rule, key) == value for key, value in properties.items())
    )


def rule_of(name: str, argument: str = "routing") -> RoutingRule:
    """Return the rule of a name."""
    if name not in RULES:
        raise InputError(f"`{argument}` must be one of {sorted(RULES)}, got {name!r}.")
    return RULES[name]


@dataclass(frozen=True)
class PresetSize:
    """One size of Table 1."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    has_depth: bool = False

    def fields(self) -> dict:
        """Return the fields of [`MomaConfig`] that this size sets."""
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
    """Return every size with every layout of experts."""
    return [f"moma-{size}-{experts}" for size in PRESET_SIZES for experts in PRESET_EXPERTS]


def preset_fields(name: str) -> dict:
    """Return the fields of [`MomaConfig`] that a preset sets."""
    if name.lower() not in preset_names():
        raise InputError(f"`name` must be one of {preset_names()}, got {name!r}.")
    size, experts = name.lower().removeprefix("moma-").rsplit("-", 1)
    return {**PRESET_SIZES[size].fields(), "num_experts": PRESET_EXPERTS[experts]}


@auto_docstring(
    custom_intro='Configuration of a [`MomaForCausalLM`]; by default that of `from_preset("moma-90m-4t4i")`.'
)
@strict
class MomaConfig(PreTrainedConfig):
    r"""
    intermediate_size (`int`, *optional*, defaults to 1365):
        Inner width `F` of one feed-forward expert (SwiGLU: three matrices of `hidden_size x F`).
    num_experts (`int` or `dict[str, int]`, *optional*, defaults to `{"text": 4, "image": 4}`):
        A dict gives every modality its own group of experts: `{"text": n, "image": m}` is the paper's "NtMi"
        (MoMa section 2.2). An int builds one group that all tokens share: 8 is the paper's "8x", 1 a dense model.
        A group of one expert is a plain feed-forward network without a router.
    expert_intermediate_size (`dict[str, int]`, *optional*):
        Inner width of the experts of single modalities. Modalities left out use `intermediate_size`.
    shared_expert_intermediate_size (`int` or `dict[str, int]`, *optional*):
        Inner width of an expert that every token passes, beside the routed ones. An int builds one for all tokens, a
        dict one for each modality that it names.
    expert_capacity_factor (`float` or `dict[str, float]`, *optional*, defaults to 1.0):
        `c` in `K = ceil(c * N / E)`, the number of tokens that one of `E` experts takes from the `N` tokens of its
        group; groups left out have 1.0, at which a token meets one expert on average (the paper's `c_e = 1 / E`).
    num_experts_per_tok (`int`, *optional*, defaults to 1):
        Experts of one token under `token_choice` routing.
    modality_token_ranges (`dict[str, list[list[int]]]`, *optional*, defaults to `{"image": [[4, 8196]]}`):
        Token ids of every modality but text, as half-open ranges `[start, stop)`. All other ids are text. Modalities
        are counted in the order of their names, whatever the order here.
    begin_image_token_id (`int`, *optional*, defaults to 8197):
        Id of the token before an image's codes. Routed as text, as the next one.
    end_image_token_id (`int`, *optional*, defaults to 8196):
        Id of the token after an image's codes.
    image_seq_length (`int`, *optional*, defaults to 1024):
        Codes of one image.
    modality_frames (`dict[str, dict[str, int]]`, *optional*):
        What stands around the codes of modalities other than images: `{"audio": {"begin": id, "end": id, "length":
        codes}}`, `length` `None` where it varies. Both tokens are routed as text. A modality without a frame can be
        read, but `generate` never writes it.
    norm_placement (`str`, *optional*, defaults to `"post"`):
        `"post"` is the paper's Swin form `h + norm(f(h))`, `"pre"` is `h + f(norm(h))`.
    gate_after_norm (`bool`, *optional*, defaults to `False`):
        With `norm_placement="post"`, also multiply the normed output by the sum of the token's gates. RMSNorm cancels
        the gate of every token that exactly one expert took, so in the paper's order the router hardly learns from it.
    qk_norm (`str`, *optional*, defaults to `"layernorm"`):
        Norm of queries and keys, each over `head_dim`: `"layernorm"` (one affine for all heads, as in Chameleon's own
        code), `"layernorm_per_head"` (an affine for each head, as its converted checkpoints need), `"rmsnorm"` or
        `"none"`.
    untied_attention (`bool`, *optional*, defaults to `False`):
        Gives every modality its own projections of attention, norms of queries and keys, and norms of the residual
        stream in each layer (Mixture-of-Transformers, arXiv 2411.04996, section 2.2); attention itself is over all
        tokens together. A token costs what it did. Needs `num_experts` by modality; with one expert each
        (`{"text": 1, "image": 1}`) this is that paper's model, but for the last norm, which all share.
    training_routing (`str`, *optional*, defaults to `"expert_choice"`):
        Routing in `train()` mode: `"expert_choice"` (sees the future), `"threshold"` or `"token_choice"`.
    inference_routing (`str`, *optional*, defaults to `"threshold"`):
        Routing in `eval()` mode, one of the causal ones: `"threshold"`, `"token_choice"` or `"auxiliary"`.
        `forward(routing=...)` overrides both.
    auxiliary_routers (`bool`, *optional*, defaults to `False`):
        Gives every router, of experts and of depth layers, the MLP that `"auxiliary"` routing asks (MoMa section 2.4).
        Frozen until [`AuxiliaryRouterTrainer`] trains it.
    normalize_gates (`bool`, *optional*, defaults to `False`):
        Divide a token's gates by their sum. The paper does not; with it, experts that are copies of one network give
        that network's output for every token that at least one of them takes. The divisor counts as a constant in the
        backward pass, since otherwise a token with one expert would tell its router nothing.
    gumbel_noise (`float`, *optional*, defaults to 0.0):
        Scale of the noise on expert routers' logits in training, 1 is the paper's Gumbel-Sigmoid (MoMa equation 5).
        For the stage after upcycling, where experts begin as copies; it stays on in every later training until it is
        set to 0. Needs another `training_routing` than `"threshold"`, whose thresholds are found without noise.
    gumbel_noise_steps (`int`, *optional*):
        Training forwards, accumulated ones counted singly, over which the noise falls linearly to nothing. Without it
        the noise stays, as in the paper.
    threshold_momentum (`float`, *optional*, defaults to 0.98):
        Momentum of the running mean that `threshold` routing compares scores with, for each expert: of points midway
        between its K-th best score in a batch and the next lower one.
    routing_warmup_steps (`int`, *optional*, defaults to 100):
        Training forwards in which `threshold` routing still selects as `expert_choice` does, until the running mean
        has settled.
    router_bias_update_rate (`float`, *optional*, defaults to 0.001):
        Step by which `token_choice` moves an expert's selection bias towards balance after each training
        forward, accumulated ones counted singly.
    balance_bias_by_modality (`bool`, *optional*, defaults to `False`):
        With one group of experts for all modalities (`num_experts` as an int), give each modality its own selection
        bias for every expert, which the balance of that modality's tokens alone moves: the experts of a mixed pool are
        then used evenly by text and by images, and not only by both together. For `token_choice`; rules by which
        experts take their best tokens read no bias, since their load is even whatever the scores are.
    depth_layers (`list[int]`, *optional*):
        Layers that process only the tokens that their depth router chooses (mixture of depths, MoMa section 2.3); the
        others pass by unchanged. The paper takes 0, 2, 4, ...; without it every layer processes every token.
    depth_capacity (`float` or `dict[str, float]`, *optional*, defaults to 0.25):
        Share of the tokens that a depth layer processes. A dict gives every modality its own share, for which its
        tokens compete among themselves.
    depth_training_routing (`str`, *optional*):
        Routing of the depth routers in `train()` mode, `training_routing` by default. `"threshold"` trains with the
        selection that inference will use.
    depth_inference_routing (`str`, *optional*):
        Routing of the depth routers in `eval()` mode, `inference_routing` by default.
    output_router_logits (`bool`, *optional*, defaults to `False`):
        Give the logits of all routers in `router_logits` of the output. Nothing is added to the loss.
    z_loss_coef (`float`, *optional*, defaults to 1e-05):
        Weight of the mean of `log(Z)^2` over the target tokens, `Z` the softmax's normaliser (Chameleon section 2.3).
    modality_loss_weights (`dict[str, float]`, *optional*):
        Weight of one target token of a modality in the training loss; modalities left out weigh 1. Images have many
        more tokens than their captions: a larger weight for text evens this out. Not applied in `eval()` mode.

    Example:

    ```python
    >>> from modeling_moma import MomaConfig, MomaForCausalLM

    >>> config = MomaConfig.from_preset("moma-90m-4t4i")
    >>> f"{config.num_parameters() / 1e6:.1f}M"
    '209.7M'
    ```"""

    model_type = "moma"
    keys_to_ignore_at_inference = ["cache", "router_logits", "modality_losses", "modality_tokens"]
    default_theta = 10000.0

    vocab_size: int = 65536
    hidden_size: int = 512
    intermediate_size: int = 1365
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None  # pyright: ignore[reportAssignmentType, reportRedeclaration]
    head_dim: int | None = None  # pyright: ignore[reportAssignmentType, reportRedeclaration]
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    attention_bias: bool = False
    rope_parameters: RopeParameters | dict | None = None  # pyright: ignore[reportAssignmentType, reportRedeclaration]
    use_cache: bool = True
    tie_word_embeddings: bool = False
    output_router_logits: bool = False
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    num_experts: int | dict[str, int] | None = None  # pyright: ignore[reportAssignmentType, reportRedeclaration]
    expert_intermediate_size: dict[str, int] | None = None
    shared_expert_intermediate_size: int | dict[str, int] | None = None
    expert_capacity_factor: float | int | dict[str, float | int] = 1.0
    num_experts_per_tok: int = 1
    modality_token_ranges: dict[str, list[list[int]]] | None = None  # pyright: ignore[reportAssignmentType, reportRedeclaration]
    begin_image_token_id: int | None = 8197
    end_image_token_id: int | None = 8196
    image_seq_length: int = 1024
    modality_frames: dict[str, dict[str, int | None]] | None = None

    norm_placement: str = "post"
    gate_after_norm: bool = False
    qk_norm: str = "layernorm"
    untied_attention: bool = False
    training_routing: str = "expert_choice"
    inference_routing: str = "threshold"
    threshold_momentum: float | int = 0.98
    routing_warmup_steps: int = 100
    router_bias_update_rate: float | int = 0.001
    balance_bias_by_modality: bool = False
    auxiliary_routers: bool = False
    normalize_gates: bool = False
    gumbel_noise: float | int = 0.0
    gumbel_noise_steps: int | None = None
    depth_layers: list[int] | None = None
    depth_capacity: float | int | dict[str, float | int] = 0.25
    depth_training_routing: str | None = None
    depth_inference_routing: str | None = None
    z_loss_coef: float | int = 1e-5
    modality_loss_weights: dict[str, float | int] | None = None

    if TYPE_CHECKING:
        # types after `__post_init__`; values are checked against the annotations above before it
        num_key_value_heads: int
        head_dim: int
        rope_parameters: dict
        num_experts: int | dict[str, int]
        modality_token_ranges: dict[str, list[list[int]]]

    def __post_init__(self, **kwargs):
        if self.num_experts is None:
            self.num_experts = {"text": 4, "image": 4}
        if self.modality_token_ranges is None:
            self.modality_token_ranges = {"image": [[4, 8196]]}
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            demand = f"must be a multiple of num_attention_heads ({self.num_attention_heads}) unless head_dim is given"
            check(self, [(self.hidden_size % self.num_attention_heads == 0, "hidden_size", demand)])
            self.head_dim = self.hidden_size // self.num_attention_heads
        for name, value in REMOVED_FIELDS.items():
            given = kwargs.pop(name, value)
            check(self, [(given == value, name, f"the field is no more; models have {value!r}", given)])
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **kwargs) -> "MomaConfig":
        """Build the configuration of one row of the paper's Table 1.

        Args:
            name (`str`):
                `moma-{90m,435m,1.4b}-{dense,1t1i,8x,4t4i}`, or with mixture of depths in every other layer
                `moma-mod-{110m,635m,2.3b}-{dense,1t1i,8x,4t4i}`.
            kwargs (`Any`):
                Fields that replace the preset's.

        Raises:
            ValueError: the name is not a preset.
        """
        return cls(**{**preset_fields(name), **kwargs})

    @staticmethod
    def preset_names() -> list[str]:
        """Return the names that `from_preset` knows."""
        return preset_names()

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities; a modality's index is its value in `mm_token_type_ids`.

        Text first, then by name: the order of a dict is lost where the configuration is saved.
        """
        return [TEXT, *sorted(self.modality_token_ranges)]

    @property
    def frames(self) -> dict[str, ModalityFrame]:
        """The frames of the modalities that can be generated, see [`ModalityFrame`], in the order of `modalities`."""
        given = (self.modality_frames or {}).items()
        tokens: dict[str, Any] = {name: [frame[key] for key in FRAME_FIELDS] for name, frame in given}
        if self.begin_image_token_id is not None and self.end_image_token_id is not None:
            tokens[IMAGE] = [self.begin_image_token_id, self.end_image_token_id, self.image_seq_length]
        return {
            name: ModalityFrame(
                name,
                tuple((start, stop) for start, stop in self.modality_token_ranges[name]),
                *tokens[name],
            )
            for name in self.modalities
            if name != TEXT and name in tokens
        }

    @property
    def expert_groups(self) -> dict[str, list[str]]:
        """Expert groups by name, each with the modalities whose tokens it serves."""
        if isinstance(self.num_experts, dict):
            return {modality: [modality] for modality in self.modalities}
        return {"all": self.modalities}

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits the base model, see [`tensor_parallel_plan`]."""
        return tensor_parallel_plan(self)

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:
        """How expert parallelism splits the base model, see [`expert_parallel_plan`]."""
        return expert_parallel_plan(self)

    @property
    def layer_types(self) -> list[str]:
        """Cache layer type of each layer, read by the cache classes of Transformers."""
        depth_layers = set(self.depth_layers or ())
        return [DEPTH_LAYER_TYPE if i in depth_layers else "full_attention" for i in range(self.num_hidden_layers)]

    @property
    def depth_pools(self) -> list[str]:
        """Pools of tokens that compete for a depth layer: `["all"]`, or one for each modality."""
        return self.modalities if isinstance(self.depth_capacity, dict) else ["all"]

    def pool_depth_capacity(self, pool: str) -> float:
        """Share of the tokens of a pool, or of a modality, that a depth layer processes."""
        return self.depth_capacity[pool] if isinstance(self.depth_capacity, dict) else self.depth_capacity

    def group_num_experts(self, group: str) -> int:
        """Return the experts `E` of a group."""
        return self.num_experts[group] if isinstance(self.num_experts, dict) else self.num_experts

    def group_intermediate_size(self, group: str) -> int:
        """Return inner width `F` of one expert of a group."""
        return (self.expert_intermediate_size or {}).get(group, self.intermediate_size)

    def group_shared_intermediate_size(self, group: str) -> int:
        """Return inner width of a group's own shared expert, 0 without one."""
        shared = self.shared_expert_intermediate_size
        return shared.get(group, 0) if isinstance(shared, dict) else 0

    @property
    def common_shared_intermediate_size(self) -> int:
        """Inner width of the shared expert of all tokens, 0 without one."""
        shared = self.shared_expert_intermediate_size
        return shared if isinstance(shared, int) else 0

    def group_capacity_factor(self, group: str) -> float:
        """Return capacity factor `c` of a group."""
        factor = self.expert_capacity_factor
        return factor.get(group, 1.0) if isinstance(factor, dict) else factor

    def num_parameters(
        self, active: bool = False, modality: str | None = None, exclude_norms_and_routers: bool = False
    ) -> int:
        """Count the parameters of `MomaForCausalLM` in closed form.

        Args:
            active (`bool`, *optional*, defaults to `False`):
                Count only what a token meets on average: `c` experts of its group (`expert_capacity_factor`), or
                `num_experts_per_tok` where `inference_routing` is `"token_choice"`, and of a depth layer the share
                `depth_capacity`.
            modality (`str`, *optional*):
                The token's modality for `active=True`. By default the largest count over the modalities.
            exclude_norms_and_routers (`bool`, *optional*, defaults to `False`):
                Count matrices alone, the convention that reproduces the paper's Table 1.

        Returns:
            `int`: number of parameters; buffers (thresholds, balance biases) are not counted.
        """
        if modality is not None and modality not in self.modalities:
            raise InputError(f"`modality` must be one of {self.modalities}, got {modality!r}.")
        return count_parameters(self, active, modality, exclude_norms_and_routers)

    def validate_layer_type(self):
        """Check nothing: `layer_types` is derived and always valid."""

    def validate_fields(self):
        """Check sizes, ids of modalities, groups of experts, switches and depth layers."""
        for demands in (size_demands, modality_demands, expert_demands, routing_demands):
            check(self, demands(self))

    def validate_rules(self):
        """Check the rules by which experts and depth layers choose; the model does it again when it is built."""
        check_rules(self)


def count_parameters(config: MomaConfig, active: bool, modality: str | None, exclude_norms_and_routers: bool) -> int:
    """Return the parameters of the model of a [`MomaConfig`]; see [`MomaConfig.num_parameters`] for the arguments."""
    if active and modality is None:
        return max(count_parameters(config, True, name, exclude_norms_and_routers) for name in config.modalities)
    width = config.hidden_size
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    layer = attention_parameters(config, modality) + 3 * width * config.common_shared_intermediate_size
    layer += sum(
        _group(config, name, active, exclude_norms_and_routers)
        for name, members in config.expert_groups.items()
        if modality is None or modality in members
    )
    if not exclude_norms_and_routers:
        layer += _norms(config, modality)
    num_depth_layers = len(config.depth_layers or ())
    layers = (config.num_hidden_layers - num_depth_layers) * layer
    layers += (
        num_depth_layers * layer * (1 if modality is None or not active else config.pool_depth_capacity(modality))
    )
    if not exclude_norms_and_routers:
        layers += width + num_depth_layers * router_parameters(config, 1)
    return round(embeddings + layers)


def attention_parameters(config: MomaConfig, modality: str | None = None) -> int:
    """Return the matrices and biases of one attention, without the norms of queries and keys."""
    query_width, key_width = (
        heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    biases = query_width + 2 * key_width + config.hidden_size if config.attention_bias else 0
    return _copies(config, modality) * (config.hidden_size * (2 * query_width + 2 * key_width) + biases)


def _copies(config: MomaConfig, modality: str | None) -> int:
    """Return of how many modalities each has its own projections and norms, of those that are counted."""
    return len(config.modalities) if config.untied_attention and modality is None else 1


def _norms(config: MomaConfig, modality: str | None) -> int:
    qk_norm = {
        "none": 0,
        "rmsnorm": 2 * config.head_dim,
        "layernorm": 4 * config.head_dim,
        "layernorm_per_head": 2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads),
    }
    return _copies(config, modality) * (2 * config.hidden_size + qk_norm[config.qk_norm])


def router_parameters(config: MomaConfig, num_scores: int) -> int:
    """Return one router of so many scores, its auxiliary router included."""
    width = config.hidden_size
    auxiliary = width // 2 * (width + num_scores) if config.auxiliary_routers else 0
    return num_scores * width + auxiliary


def _group(config: MomaConfig, group: str, active: bool, exclude_routers: bool) -> float:
    num_experts = config.group_num_experts(group)
    expert = 3 * config.hidden_size * config.group_intermediate_size(group)
    shared = 3 * config.hidden_size * config.group_shared_intermediate_size(group)
    if num_experts == 1:
        return expert + shared
    router = 0 if exclude_routers else router_parameters(config, num_experts)
    used = num_experts
    if active:
        # while the routing module is not imported, no rule is known
        rule = RULES.get(config.inference_routing)
        used = config.group_capacity_factor(group) if rule is None else rule.experts_per_token(config, group)
    return used * expert + shared + router


# what holds, the field, what it has to be, and its value where another one than the field's is shown
Demand = tuple[bool, str, str] | tuple[bool, str, str, Any]


def check(config: MomaConfig, demands: Iterable[Demand]):
    """Raise a `ValueError` at the first demand that does not hold; none after it is looked at."""
    for holds, name, demand, *value in demands:
        if not holds:
            raise InputError(f"`{name}` = {value[0] if value else getattr(config, name)!r}: {demand}.")


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "image_seq_length"),
)
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
CHOICES = {
    "norm_placement": ("pre", "post"),
    "qk_norm": ("layernorm", "layernorm_per_head", "rmsnorm", "none"),
}


def size_demands(config: MomaConfig) -> Iterator[Demand]:
    """Yield demands on sizes, heads and the fields of attention."""
    for name in SIZES:
        yield getattr(config, name) > 0, name, "must be a positive integer"
    heads, vocab_size = config.num_attention_heads, config.vocab_size
    serves = f"must divide num_attention_heads ({heads}): each serves a group of query heads"
    yield heads % config.num_key_value_heads == 0, "num_key_value_heads", serves
    even = "must be even: rotary embeddings turn pairs of channels. Unset, it is hidden_size // num_attention_heads"
    yield config.head_dim % 2 == 0, "head_dim", even
    yield 0 <= config.attention_dropout < 1, "attention_dropout", "must be in [0, 1)"
    for name in ("rms_norm_eps", "initializer_range"):
        yield 0 < getattr(config, name) < math.inf, name, "must be positive and finite"
    for name in SPECIAL_TOKENS:
        fits = all(0 <= token_id < vocab_size for token_id in _ids(config, name))
        yield fits, name, f"must be None or below vocab_size ({vocab_size})"
    yield config.hidden_act in ACT2FN, "hidden_act", "must be an activation of Transformers"
    has_weights = any(True for _ in ACT2FN[config.hidden_act].parameters())
    yield not has_weights, "hidden_act", "must be an activation without parameters"
    rotary, kinds = config.rope_parameters or {}, ["default", *ROPE_INIT_FUNCTIONS]
    is_whole = rotary.get("partial_rotary_factor", 1.0) == 1.0
    yield is_whole, "rope_parameters", "must turn whole heads: partial_rotary_factor has to be 1"
    theta = rotary.get("rope_theta", 1.0)
    is_number = isinstance(theta, int | float) and not isinstance(theta, bool) and 0 < theta < math.inf
    yield is_number, "rope_parameters", "rope_theta must be a positive number"
    yield rotary.get("rope_type", "default") in kinds, "rope_parameters", f"rope_type must be one of {kinds}"


def modality_demands(config: MomaConfig) -> Iterator[Demand]:
    """Yield demands on the ranges of ids and the tokens around an image."""
    name, vocab_size, taken = "modality_token_ranges", config.vocab_size, []
    for modality, ranges in config.modality_token_ranges.items():
        problem = problem_of_name(modality)
        yield problem is None, name, f"no name of a modality: {problem}", {modality: ranges}
        yield len(ranges) > 0, name, "needs a range of ids at least", {modality: ranges}
        for bounds in ranges:
            fits = len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= vocab_size
            demand = f"needs [start, stop) with 0 <= start < stop <= vocab_size ({vocab_size})"
            yield fits, name, demand, {modality: bounds}
            for other in taken:
                is_apart = bounds[1] <= other[0] or other[1] <= bounds[0]
                yield is_apart, name, f"overlaps {other}: an id has one modality", {modality: bounds}
            taken.append(bounds)
    for name in ("begin_image_token_id", "end_image_token_id"):
        for token_id in _ids(config, name):
            yield 0 <= token_id < vocab_size, name, f"must be below vocab_size ({vocab_size})"
            inside = "lies inside modality_token_ranges: the tokens around an image are text"
            yield not _is_code(config, token_id), name, inside
    if IMAGE in config.modality_token_ranges:
        begin, longest = config.begin_image_token_id, config.max_position_embeddings
        differs = begin is None or begin != config.end_image_token_id
        yield differs, "begin_image_token_id", "must differ from end_image_token_id"
        fits = config.image_seq_length + 2 <= longest
        demand = f"plus two tokens around an image must fit max_position_embeddings ({longest})"
        yield fits, "image_seq_length", demand
    yield from frame_demands(config)


def frame_demands(config: MomaConfig) -> Iterator[Demand]:
    """Yield demands on the tokens around the codes of modalities other than images."""
    name, longest = "modality_frames", config.max_position_embeddings
    for modality, frame in (config.modality_frames or {}).items():
        own = {modality: frame}
        elsewhere = "the frame of images stands in begin_image_token_id, end_image_token_id and image_seq_length"
        yield modality != IMAGE, name, elsewhere, own
        known = sorted(set(config.modality_token_ranges) - {IMAGE})
        demand = f"names no modality of modality_token_ranges that can have one: {known}"
        yield modality in config.modality_token_ranges, name, demand, own
        yield set(frame) == set(FRAME_FIELDS), name, f"needs exactly the keys {list(FRAME_FIELDS)}", own
        length = frame["length"]
        demand = "'length' must be a positive number of codes, or None for any number"
        yield length is None or length >= 1, name, demand, own
        demand = f"'length' plus two tokens around the codes must fit max_position_embeddings ({longest})"
        yield (length or 1) + 2 <= longest, name, demand, own
    taken = {}
    if (image := config.frames.get(IMAGE)) is not None:
        taken = {image.begin: "begin_image_token_id", image.end: "end_image_token_id"}
    for modality, frame in (config.modality_frames or {}).items():
        own = {modality: frame}
        for key in ("begin", "end"):
            token_id = -1 if (given := frame[key]) is None else given
            demand = f"{key!r} must be an id below vocab_size ({config.vocab_size})"
            yield 0 <= token_id < config.vocab_size, name, demand, own
            demand = f"{key!r} lies inside modality_token_ranges: tokens around codes are text"
            yield not _is_code(config, token_id), name, demand, own
            demand = f"{key!r} is also {taken.get(token_id)}: each token needs its own id"
            yield token_id not in taken, name, demand, own
            taken[token_id] = f"{key!r} of {modality!r}"
    begins = {frame.begin for frame in config.frames.values()}
    for name in SPECIAL_TOKENS:
        ids = _ids(config, name)
        is_text = not any(_is_code(config, token_id) for token_id in ids)
        yield is_text, name, "lies inside modality_token_ranges: special tokens are text"
        yield begins.isdisjoint(ids), name, "begins a frame of codes, and needs an id of its own"


def expert_demands(config: MomaConfig) -> Iterator[Demand]:
    """Yield demands on the expert groups: counts, widths, capacities, shared experts."""
    yield from _of_modalities(config, "num_experts", complete=True)
    num_experts, has_groups = config.num_experts, isinstance(config.num_experts, dict)
    for group in config.expert_groups:
        count, capacity = config.group_num_experts(group), config.group_capacity_factor(group)
        yield count >= 1, "num_experts", "must be at least 1 in every group"
        # a single expert takes every token, whatever others of its configuration take
        demand = f"must be in (0, E]: with c = E = {count} every expert takes every token of group {group!r}"
        yield 0 < capacity and (capacity <= count or count == 1), "expert_capacity_factor", demand
    demand = f"needs num_experts as an int above 1, got {num_experts!r}: groups by modality have routers, and "
    demand += "biases, of their own, and a single expert has none"
    is_pool = isinstance(num_experts, int) and num_experts > 1
    yield not config.balance_bias_by_modality or is_pool, "balance_bias_by_modality", demand
    demand = "needs num_experts as a dict: a single group of experts has the width intermediate_size"
    yield config.expert_intermediate_size is None or has_groups, "expert_intermediate_size", demand
    for name in ("expert_intermediate_size", "shared_expert_intermediate_size", "expert_capacity_factor"):
        yield from _of_modalities(config, name)
    for name in ("expert_intermediate_size", "shared_expert_intermediate_size"):
        value = getattr(config, name)
        widths = value.values() if isinstance(value, dict) else [] if value is None else [value]
        yield all(width > 0 for width in widths), name, "must be positive; leave it out for none"
    for name in ("shared_expert_intermediate_size", "expert_capacity_factor"):
        demand = "by modality needs num_experts by modality: a single group of experts serves all"
        yield has_groups or not isinstance(getattr(config, name), dict), name, demand
    yield 1 <= config.num_experts_per_tok, "num_experts_per_tok", "must be at least 1"


def routing_demands(config: MomaConfig) -> Iterator[Demand]:
    """Yield demands on the switches of norms, routing, losses and depth layers, but for the names of rules."""
    for name, choices in CHOICES.items():
        yield getattr(config, name) in choices, name, f"must be one of {choices}"
    is_useful = not config.gate_after_norm or config.norm_placement == "post"
    yield is_useful, "gate_after_norm", "needs norm_placement='post': with 'pre' nothing cancels the gate"
    demand = f"needs num_experts by modality, as {{'text': 4, 'image': 4}}, got {config.num_experts!r}: tokens are "
    demand += "split for attention as for the expert groups"
    yield not config.untied_attention or isinstance(config.num_experts, dict), "untied_attention", demand
    yield 0 <= config.threshold_momentum < 1, "threshold_momentum", "must be in [0, 1)"
    steps = config.gumbel_noise_steps
    yield steps is None or steps > 0, "gumbel_noise_steps", "must be positive, or None for noise that stays"
    for name in ("routing_warmup_steps", "router_bias_update_rate", "z_loss_coef", "gumbel_noise"):
        yield 0 <= getattr(config, name) < math.inf, name, "must be 0 or positive, and finite"
    yield from _of_modalities(config, "modality_loss_weights")
    are_finite = all(0 <= weight < math.inf for weight in (config.modality_loss_weights or {}).values())
    yield are_finite, "modality_loss_weights", "must be finite, not negative"
    layers, number = config.depth_layers or [], config.num_hidden_layers
    are_ascending = all(0 <= layer < number for layer in layers) and sorted(set(layers)) == layers
    yield are_ascending, "depth_layers", f"must be ascending indices of the {number} layers, counted from 0"
    yield from _of_modalities(config, "depth_capacity", complete=True)
    for pool in config.depth_pools:
        yield 0 < config.pool_depth_capacity(pool) <= 1, "depth_capacity", "is a share of the tokens, in (0, 1]"


def rule_demands(config: MomaConfig) -> Iterator[Demand]:
    """Yield demands on the names of rules, and what rules ask of other fields."""
    training, causal, noisy, counting, balanced = (
        rule_names(**{key: True}) for key in ("may_train", "is_causal", "takes_noise", "counts_experts", "moves_bias")
    )
    yield config.training_routing in training, "training_routing", f"must be one of {training}"
    demand = f"must be one of {causal}: expert_choice sees the future. To measure it, call "
    demand += "forward(routing='expert_choice')"
    yield config.inference_routing in causal, "inference_routing", demand
    for name, choices in (("depth_training_routing", training), ("depth_inference_routing", causal)):
        demand = f"must be one of {choices}, or None for {name.removeprefix('depth_')}"
        yield getattr(config, name) in (None, *choices), name, demand
    demand = f"needs a training_routing of {noisy}: others compare scores with thresholds that were found without "
    demand += "noise"
    yield config.gumbel_noise == 0 or config.training_routing in noisy, "gumbel_noise", demand
    rules = {config.training_routing, config.inference_routing}
    if not rules.isdisjoint(counting):
        sizes = [config.group_num_experts(group) for group in config.expert_groups]
        # a single expert takes every token once
        fewest = min((size for size in sizes if size > 1), default=config.num_experts_per_tok)
        demand = f"exceeds the smallest group of experts ({fewest})"
        yield config.num_experts_per_tok <= fewest, "num_experts_per_tok", demand
    demand = f"needs a training_routing or inference_routing of {balanced}: other rules read no bias"
    is_read = not config.balance_bias_by_modality or not rules.isdisjoint(balanced)
    yield is_read, "balance_bias_by_modality", demand
    for name in ("inference_routing", "depth_inference_routing"):
        value = getattr(config, name)
        has_routers = value is None or not RULES[value].needs_auxiliary or config.auxiliary_routers
        demand = "needs auxiliary_routers=True, and `moma train-auxiliary-routers` to train them"
        yield has_routers, name, demand


def check_rules(config: MomaConfig):
    """Check the names of rules, and what rules ask of other fields."""
    if RULES:
        check(config, rule_demands(config))


def _ids(config: MomaConfig, name: str) -> list[int]:
    """Return the ids of a field that may have one, several or none."""
    given = getattr(config, name)
    return given if isinstance(given, list) else [] if given is None else [given]


def _is_code(config: MomaConfig, token_id: int) -> bool:
    ranges = [bounds for ranges in config.modality_token_ranges.values() for bounds in ranges]
    return any(start <= token_id < stop for start, stop in ranges)


def _of_modalities(config: MomaConfig, name: str, complete: bool = False) -> Iterator[Demand]:
    value = getattr(config, name)
    if isinstance(value, dict):
        unknown = sorted(set(value) - set(config.modalities))
        yield not unknown, name, f"names {unknown}, which modality_token_ranges does not define"
        missing = sorted(set(config.modalities) - set(value)) if complete else []
        yield not missing, name, f"lacks {missing}: every modality needs its own"


__all__ = [
    "DEPTH_LAYER_TYPE",
    "PRESET_EXPERTS",
    "PRESET_SIZES",
    "RULES",
    "MomaConfig",
    "RoutingRule",
    "attention_parameters",
    "check_rules",
    "router_parameters",
    "rule_names",
    "rule_of",
]
