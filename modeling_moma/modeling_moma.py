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
"""The MoMa decoder: attention that all modalities share, feed-forward layers split into expert groups."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from huggingface_hub import CommitInfo
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import ModelOutput, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_moma import MomaAttention
from .auxiliary_moma import MomaAuxiliaryRouter
from .batch_routing_moma import routing_of_batch, seen_positions
from .configuration_moma import MomaConfig
from .decoder_layers_moma import MomaDecoderLayer, MomaDepthDecoderLayer
from .dispatch_moma import DEFAULT_IMPLEMENTATION
from .document_lengths_moma import document_lengths, goes_by_lengths
from .errors_moma import InputError
from .experts_moma import MomaExperts
from .generation_moma import MomaGenerationMixin
from .growing_cache_moma import let_grow
from .loss_moma import causal_lm_loss
from .model_card_moma import complete_model_card
from .norms_moma import MomaHeadLayerNorm, MomaRMSNorm
from .quantized_layers_moma import use_quantized_layers
from .rotary_moma import MomaRotaryEmbedding
from .router_base_moma import MomaRouterBase
from .router_updates_moma import update_routers
from .routing_moma import MomaRouter
from .step_products_moma import project
from .unseen_layers_moma import layer_mode


@auto_docstring(
    custom_intro="""
    Output of [`MomaForCausalLM`].
    """
)
@dataclass
class MomaCausalLMOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        In training with modality weights and z-loss; the plain mean cross-entropy in eval mode.
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, config.vocab_size)`):
        Prediction scores before the softmax.
    cache (`Cache`, *optional*, returned when `use_cache=True`):
        Keys and values of the attention layers.
    router_logits (`tuple(torch.FloatTensor)`, *optional*, returned when `output_router_logits=True`):
        One tensor of shape `(tokens of the group, experts of the group)` for every layer and group with a router,
        layer by layer, in the order of `config.expert_groups`. In steps of one token with a static cache every group
        has a row for every position.
    modality_losses (`dict[str, torch.Tensor]`, *optional*, returned when `labels` is provided):
        Mean cross-entropy, in nats, of the target tokens of each modality, detached and unweighted.
    modality_tokens (`dict[str, torch.Tensor]`, *optional*, returned when `labels` is provided):
        Number of target tokens of each modality.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    modality_losses: dict[str, torch.Tensor] | None = None
    modality_tokens: dict[str, torch.Tensor] | None = None


@auto_docstring
class MomaPreTrainedModel(PreTrainedModel):
    config: MomaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # pyright: ignore[reportAssignmentType]
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MomaDecoderLayer", "MomaDepthDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # torchao, bitsandbytes and most other quantizers leave these out, and match whole names, as regular expressions
    _keep_in_fp32_modules = [".*router"]
    _keep_in_fp32_modules_strict = ["router", "depth_router"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(MomaRouter, index=0),
        "hidden_states": MomaDecoderLayer,
        "attentions": MomaAttention,
    }
    # the library looks for the decorator of the experts in this file only
    _can_set_experts_implementation_cached_value = True

    if TYPE_CHECKING:
        # the library's wrapper says nothing of what it gives
        def to(self, *args, **kwargs) -> Self: ...

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> Self:
        """See `PreTrainedModel.from_pretrained`; auxiliary routers are frozen, as in a new model."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, MomaAuxiliaryRouter):
                module.requires_grad_(False)
        if getattr(model, "is_quantized", False):
            use_quantized_layers(model)
        return loaded

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """See `PreTrainedModel.get_correct_experts_implementation`; `"moma"` where none is asked for.

        Raises:
            ValueError: there is no such implementation.
        """
        if requested_experts is None:
            return DEFAULT_IMPLEMENTATION
        return super().get_correct_experts_implementation(requested_experts)

    def _upload_modified_files(self, working_dir: str | Path, *args, **kwargs) -> CommitInfo:
        # the last step of `push_to_hub`, which has written the card before it
        card = Path(working_dir) / "README.md"
        if card.is_file():
            complete_model_card(card)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MomaExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MomaRouterBase):
            init.normal_(module.weight, mean=0.0, std=std)
            init.constant_(module.threshold, 0.5)
            init.zeros_(module.balance_bias)
            init.zeros_(module.num_updates)
        elif isinstance(module, MomaAuxiliaryRouter):
            init.constant_(module.threshold, 0.5)
        elif isinstance(module, MomaHeadLayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


@auto_docstring
class MomaModel(MomaPreTrainedModel):
    def __init__(self, config: MomaConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        depth_layers = set(config.depth_layers or ())
        # depth layers wait for who takes part
        self._can_compile_fullgraph = not depth_layers
        self.layers = nn.ModuleList(
            [
                (MomaDepthDecoderLayer if layer_idx in depth_layers else MomaDecoderLayer)(config, layer_idx)
                for layer_idx in range(config.num_hidden_layers)
            ]
        )
        self.norm = MomaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MomaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        routing: str | None = None,
        depth_routing: str | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]
    ) -> MoeModelOutputWithPast:
        r"""
        mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Modality of each position, an index into `config.modalities`; used only with `inputs_embeds` (all text
            without it). With `input_ids` the ids themselves tell the modality.
        routing (`str`, *optional*):
            How experts and tokens choose each other: `"expert_choice"`, `"threshold"`, `"token_choice"` or
            `"auxiliary"`. Defaults to `config.training_routing` in `train()` mode and to `config.inference_routing` in
            `eval()` mode. A loss under `"expert_choice"` sees the future and says nothing about quality.
        depth_routing (`str`, *optional*):
            How depth layers choose their tokens. Defaults to `routing` where that is given, else to the fields of the
            config.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
        # with the caller's cache this may be a chunk of a longer prompt, and lie wholly in a row's padding
        is_whole_prompt = cache is None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            let_grow(cache)
        # before the embedding: a bad id of a prompt has to meet our message, not the embedding's
        context = routing_of_batch(
            self.config,
            input_ids,
            inputs_embeds,
            attention_mask,
            position_ids,
            mm_token_type_ids,
            cache,
            is_whole_prompt,
            is_training=self.training,
            routing=routing,
            depth_routing=depth_routing,
            is_recorded=bool(kwargs.get("output_router_logits", self.config.output_router_logits)),
        )
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        by_lengths = goes_by_lengths(self.config)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            cache=cache,
            # only those of the caller may begin again within a row, for which the mask would wait to look
            position_ids=None if by_lengths else position_ids,
            # the columns of a static cache that no token fills yet have to be hidden, in steps of one token too
            allow_is_causal_skip=not isinstance(cache, StaticCache) or hidden_states.shape[1] > 1,
        )
        lengths = document_lengths(self, kwargs, hidden_states, attention_mask, causal_mask, position_ids, cache)
        kwargs.update(lengths)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen_positions(cache)
            position_ids = position_ids.unsqueeze(0)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        # fewer where the model drafts for itself (`assistant_early_exit`)
        with layer_mode():
            for decoder_layer in self.layers[: self.config.num_hidden_layers]:
                hidden_states = decoder_layer(
                    hidden_states,
                    routing_context=context,
                    attention_mask=causal_mask,
                    # flash attention would sync in every layer to look for what has been found
                    position_ids=None if by_lengths else position_ids,
                    position_embeddings=position_embeddings,
                    cache=cache,
                    use_cache=use_cache,
                    **kwargs,  # pyright: ignore[reportCallIssue]
                )
        hidden_states = self.norm(hidden_states)
        if context.track:
            update_routers(context, self.config.router_bias_update_rate)
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, cache=cache)


@auto_docstring
class MomaForCausalLM(MomaPreTrainedModel, MomaGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # pyright: ignore[reportAssignmentType]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MomaConfig):
        super().__init__(config)
        self.model = MomaModel(config)
        self._can_compile_fullgraph = self.model._can_compile_fullgraph
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(
        config: MomaConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | BlockMask | None:
        """The mask of a step; a prompt's is made by the model itself: its routers have to see the padding."""
        # CODEPATH: models with mixture of depths, as recipes/emoji-mod-4t4i.yaml, whose caches are not compiled
        if inputs_embeds.shape[1] > 1 or config.depth_layers:
            return attention_mask
        return create_causal_mask(
            config, inputs_embeds, attention_mask, cache, position_ids=position_ids, allow_is_causal_skip=False
        )

    @can_return_tuple
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        routing: str | None = None,
        depth_routing: str | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]
    ) -> MomaCausalLMOutput:
        r"""
        mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            See [`MomaModel.forward`].
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Targets, a copy of `input_ids` with -100 where no loss is wanted; shifted inside. Picture codes count like
            words. What `attention_mask` hides is no target and predicts none.
        routing (`str`, *optional*):
            See [`MomaModel.forward`].
        depth_routing (`str`, *optional*):
            See [`MomaModel.forward`].
        skip_logits (`bool`, *optional*):
            With labels, compute the loss from the logits of a few positions at a time and return none: the memory of
            a large vocabulary is spared. The loss and its gradients are the same up to rounding.

        Example:

        ```python
        >>> from PIL import Image
        >>> from transformers import AutoModelForCausalLM, AutoProcessor
        >>> import modeling_moma

        >>> model = AutoModelForCausalLM.from_pretrained("model_cards/moma-emoji")
        >>> processor = AutoProcessor.from_pretrained("model_cards/moma-emoji")
        >>> inputs = processor(images=[Image.open("picture.png")], text=["<image>"], return_tensors="pt")
        >>> ids = model.generate(**inputs, max_new_tokens=16, generation_mode="text")
        >>> processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ```"""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            use_cache=use_cache,
            routing=routing,
            depth_routing=depth_routing,
            **kwargs,  # pyright: ignore[reportCallIssue]
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        loss = logits = modality_losses = modality_tokens = None
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        if not (skip_logits and has_labels):
            logits = project(self.lm_head, hidden_states).contiguous()
        if has_labels:
            parts = causal_lm_loss(
                self.config,
                hidden_states if logits is None else logits,
                labels,
                training=self.training,
                attention_mask=attention_mask,
                head=self.lm_head if logits is None else None,
                **kwargs,
            )
            loss, modality_losses, modality_tokens = parts.loss, parts.modality_losses, parts.modality_tokens
        return MomaCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            modality_losses=modality_losses,
            modality_tokens=modality_tokens,
        )


__all__ = ["MomaCausalLMOutput", "MomaForCausalLM", "MomaModel", "MomaPreTrainedModel"]
