# SPDX-License-Identifier: Apache-2.0
"""Training low-rank adapters (LoRA, arXiv 2106.09685) by PEFT in place of the weights."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors_moma import InputError
from ..frames_moma import TEXT
from ..modeling_moma import MomaForCausalLM
from ..utils.errors import needs_extra
from .freezing import check_groups, learning_tokens


if TYPE_CHECKING:
    from peft import PeftModel


_LINEAR = r"(gate_proj|up_proj|down_proj)"


def with_adapters(model: MomaForCausalLM, rank: int, frozen_groups: Sequence[str] = ()) -> "PeftModel":
    """Put adapters beside attention and expert groups, and let the rows of all tokens but those of text learn.

    Routers stay as they are. After training, `merge_and_unload()` gives the model with the adapters in its weights.
    """
    if rank < 1:
        raise InputError(f"`--lora-rank` = {rank}: a rank is at least 1.")
    with needs_extra("`--lora-rank` needs PEFT", "finetune"):
        from peft import LoraConfig, get_peft_model

    config = model.config
    check_groups(config, frozen_groups)
    learning = {group: members for group, members in config.expert_groups.items() if group not in frozen_groups}
    groups = "|".join(map(re.escape, learning))
    modalities = "|".join(re.escape(modality) for members in learning.values() for modality in members)
    # projections of a modality's own stay as they are with its group
    of_modality = rf"modalities\.({modalities})\." if config.untied_attention else ""
    networks = [rf"self_attn\.{of_modality}(q_proj|k_proj|v_proj|o_proj)", rf"mlp\.shared_expert\.{_LINEAR}"]
    if not groups and config.untied_attention and not config.common_shared_intermediate_size:
        raise InputError(
            f"`--freeze-groups` {list(frozen_groups)} leaves nothing that `--lora-rank` could adapt: with "
            "`untied_attention` all projections are those of a group's modalities."
        )
    if groups:
        networks.append(rf"groups\.({groups})\.(mlp|shared_expert)\.{_LINEAR}")
    packed = [name for name, _ in model.named_parameters() if groups and re.search(rf"\.({groups})\.experts\.", name)]
    new_modalities = [modality for modality in config.modalities if modality != TEXT]
    matrices = ["embed_tokens"] if config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    rows = learning_tokens(config, new_modalities).nonzero().flatten().tolist()
    adapters = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=rf".*\.({'|'.join(networks)})",
        target_parameters=packed or None,
        trainable_token_indices={name: rows for name in matrices} if rows else None,
    )
    return get_peft_model(model, adapters)  # pyright: ignore[reportReturnType]
