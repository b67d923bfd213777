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
"""MoMa model configuration: every size and switch, and what follows from them."""

from typing import TYPE_CHECKING

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import auto_docstring

from .configuration_checks_moma import (
    check_depth,
    check_experts,
    check_modalities,
    check_routing,
    check_sizes,
    require,
)
from .errors_moma import InputError
from .frames_moma import ModalityFrame, config_frames
from .parallel_plans_moma import expert_parallel_plan, tensor_parallel_plan
from .parameter_counts_moma import count_parameters
from .presets_moma import preset_fields, preset_names
from .transformers_gaps_moma import AUTO_MAP


TEXT = "text"
DEPTH_LAYER_TYPE = "moma_depth"


@auto_docstring(checkpoint="moma-90m-4t4i")
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
        group. At 1.0 a token meets one expert on average (the paper's `c_e = 1 / E` of the tokens).
    num_experts_per_tok (`int`, *optional*, defaults to 1):
        Experts of one token under `token_choice` routing.
    modality_token_ranges (`dict[str, list[list[int]]]`, *optional*, defaults to `{"image": [[4, 8196]]}`):
        Token ids of every modality but text, as half-open ranges `[start, stop)`. All other ids are text. Modalities
        are counted in the order of their names, whatever the order here.
    begin_image_token_id (`int`, *optional*, defaults to 8197):
        Id of the token before a picture's codes. Routed as text, as the next one.
    end_image_token_id (`int`, *optional*, defaults to 8196):
        Id of the token after a picture's codes.
    image_seq_length (`int`, *optional*, defaults to 1024):
        Codes of one picture.
    modality_frames (`dict[str, dict[str, int]]`, *optional*):
        What stands around the codes of modalities other than pictures: `{"audio": {"begin": id, "end": id, "length":
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
        set to 0. Needs another `training_routing` than `"threshold"`, whose cuts are found without noise.
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
        Step by which `token_choice` moves an expert's selection bias towards balance after each training step.
    depth_layers (`list[int]`, *optional*):
        Layers that process only the tokens that their depth router chooses (mixture of depths, MoMa section 2.3); the
        others pass by unchanged. The paper takes 0, 2, 4, ...; without it every layer processes every token.
    depth_capacity (`float` or `dict[str, float]`, *optional*, defaults to 0.25):
        Share of the tokens that a depth layer processes. A dict gives every modality its own share, for which its
        tokens compete among themselves.
    depth_pool (`str`, *optional*, defaults to `"batch"`):
        Tokens that compete with one another: all of the `"batch"` (MoMa), or those of each `"row"`.
    depth_threshold_momentum (`float`, *optional*, defaults to 0.5):
        Momentum of the same running mean of depth routers, which cuts under `threshold`. Depth routers see the bare
        residual stream and their scores drift fast: where the cut also selects in training, a mean that lags behind
        lets too few tokens through. Every training forward counts, so small micro-batches may want a higher one.
    depth_training_routing (`str`, *optional*):
        Routing of the depth routers in `train()` mode, `training_routing` by default. `"threshold"` trains with the
        selection that inference will use.
    depth_inference_routing (`str`, *optional*):
        Routing of the depth routers in `eval()` mode, `inference_routing` by default.
    z_loss_coef (`float`, *optional*, defaults to 1e-05):
        Weight of the mean of `log(Z)^2` over the target tokens, `Z` the softmax's normaliser (Chameleon section 2.4).
    modality_loss_weights (`dict[str, float]`, *optional*):
        Weight of one target token of a modality in the training loss; modalities left out weigh 1. Pictures have many
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
    expert_capacity_factor: float | int | dict[str, float] = 1.0
    num_experts_per_tok: int = 1
    modality_token_ranges: dict[str, list[list[int]]] | None = None  # pyright: ignore[reportAssignmentType, reportRedeclaration]
    begin_image_token_id: int | None = 8197
    end_image_token_id: int | None = 8196
    image_seq_length: int = 1024
    modality_frames: dict[str, dict[str, int | None]] | None = None

    norm_placement: str = "post"
    gate_after_norm: bool = False
    qk_norm: str = "layernorm"
    training_routing: str = "expert_choice"
    inference_routing: str = "threshold"
    threshold_momentum: float = 0.98
    routing_warmup_steps: int = 100
    router_bias_update_rate: float = 0.001
    auxiliary_routers: bool = False
    normalize_gates: bool = False
    gumbel_noise: float | int = 0.0
    gumbel_noise_steps: int | None = None
    depth_layers: list[int] | None = None
    depth_capacity: float | int | dict[str, float] = 0.25
    depth_pool: str = "batch"
    depth_threshold_momentum: float = 0.5
    depth_training_routing: str | None = None
    depth_inference_routing: str | None = None
    z_loss_coef: float = 1e-5
    modality_loss_weights: dict[str, float] | None = None

    if TYPE_CHECKING:
        # what `__post_init__` leaves; the annotations above are what values are checked against before it
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
            require(
                self.hidden_size % self.num_attention_heads == 0,
                "hidden_size",
                self.hidden_size,
                f"must be a multiple of num_attention_heads ({self.num_attention_heads}) unless head_dim is given",
            )
            self.head_dim = self.hidden_size // self.num_attention_heads
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **kwargs) -> "MomaConfig":
        """Build the configuration of one row of the paper's Table 1.

        Args:
            name (`str`):
                `moma-{90m,435m,1.4b}-{dense,1t1i,8x,4t4i}`, or with mixture of depths in every other layer
                `moma-mod-{110m,635m,2.3b}-{dense,1t1i,8x,4t4i}`.
            kwargs:
                Fields that replace the preset's.

        Raises:
            ValueError: the name is not a preset.
        """
        return cls(**{**preset_fields(name), **kwargs})

    @staticmethod
    def preset_names() -> list[str]:
        """Names that `from_preset` knows."""
        return preset_names()

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities; a modality's place is its value in `mm_token_type_ids`.

        Text first, then by name: the order of a dict is lost where the configuration is saved.
        """
        return [TEXT, *sorted(self.modality_token_ranges)]

    @property
    def frames(self) -> dict[str, ModalityFrame]:
        """The frames of the modalities that can be generated, see [`ModalityFrame`], in the order of `modalities`."""
        return config_frames(self)

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
        """Experts `E` of a group."""
        return self.num_experts[group] if isinstance(self.num_experts, dict) else self.num_experts

    def group_intermediate_size(self, group: str) -> int:
        """Inner width `F` of one expert of a group."""
        return (self.expert_intermediate_size or {}).get(group, self.intermediate_size)

    def group_shared_intermediate_size(self, group: str) -> int:
        """Inner width of a group's own shared expert, 0 without one."""
        shared = self.shared_expert_intermediate_size
        return shared.get(group, 0) if isinstance(shared, dict) else 0

    @property
    def common_shared_intermediate_size(self) -> int:
        """Inner width of the shared expert of all tokens, 0 without one."""
        shared = self.shared_expert_intermediate_size
        return shared if isinstance(shared, int) else 0

    def group_capacity_factor(self, group: str) -> float:
        """Capacity factor `c` of a group."""
        factor = self.expert_capacity_factor
        return factor.get(group, 1.0) if isinstance(factor, dict) else factor

    def num_parameters(
        self, active: bool = False, modality: str | None = None, exclude_norms_and_routers: bool = False
    ) -> int:
        """Count the parameters of `MomaForCausalLM` in closed form.

        Args:
            active (`bool`, *optional*, defaults to `False`):
                Count only what a token meets on average: `c` experts of its group (`expert_capacity_factor`), and of a
                depth layer the share `depth_capacity`.
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
        """`layer_types` is derived and always valid."""

    def validate_sizes(self):
        """Check sizes, heads and the fields of attention."""
        check_sizes(self)

    def validate_modalities(self):
        """Check the ranges of ids and the tokens around a picture."""
        check_modalities(self)

    def validate_experts(self):
        """Check the expert groups: counts, widths, capacities, shared experts."""
        check_experts(self)

    def validate_routing(self):
        """Check the switches of norms, routing and losses."""
        check_routing(self)

    def validate_depth(self):
        """Check the depth layers and the routing of their tokens."""
        check_depth(self)


__all__ = ["MomaConfig"]
