# SPDX-License-Identifier: Apache-2.0
"""Which weights tensor and expert parallelism split, and how: plans in the form that Transformers reads.

Names are relative to [`MomaModel`]; `*` stands for the number of a layer. Fully sharded data parallelism takes whole
layers of the base model, as Transformers has it by default.
"""

from typing import Any


def tensor_parallel_plan(config: Any) -> dict[str, str]:
    """Return a rule for every parameter of the base model.

    Heads and inner widths are split. Routers and norms of the residual stream are replicated, so that every process of
    a tensor-parallel group, which share a batch, sends its tokens to the same experts.
    """
    norms = [f"{norm}{end}" for norm in ("attention_norm", "ffn_norm") for end in _modality_names(config, ".")]
    rules = {**_attention_rules(config), **dict.fromkeys(norms, "replicate")}
    for group in config.expert_groups:
        rules |= _group_rules(config, group)
    if config.common_shared_intermediate_size:
        rules |= _mlp_rules("mlp.shared_expert")
    if config.depth_layers:
        rules |= _router_rules(config, "depth_router")
    # split by the vocabulary, as MomaForCausalLM's plan splits the head, which may be tied to the embedding
    plan = {"embed_tokens": "embedding_rowwise", "norm": "replicate"}
    return plan | {f"layers.*.{name}": style for name, style in rules.items()}


def expert_parallel_plan(config: Any) -> dict[str, str] | None:
    """Return rules that give each process some experts of every group; groups of one are tensor-parallel."""
    plan = {}
    for group in config.expert_groups:
        if config.group_num_experts(group) > 1:
            experts = f"layers.*.mlp.groups.{group}.experts"
            plan |= {
                f"{experts}.gate_up_proj": "grouped_gemm",
                f"{experts}.down_proj": "grouped_gemm",
                experts: "ep_dispatch_experts",
            }
    return plan or None


def _modality_names(config: Any, before: str) -> list[str]:
    """Return what stands after a name where each modality has its own; nothing where all share one."""
    return [f"{before}{modality}" for modality in config.modalities] if config.untied_attention else [""]


def _attention_rules(config: Any) -> dict[str, str]:
    rules = {}
    for own in _modality_names(config, ".modalities."):
        attention = f"self_attn{own}"
        rules |= dict.fromkeys((f"{attention}.{name}_proj" for name in "qkv"), "colwise")
        rules[f"{attention}.o_proj"] = "rowwise"
        for norm in (f"{attention}.q_norm", f"{attention}.k_norm"):
            if config.qk_norm == "layernorm_per_head":
                # each head has its own scale and bias, which are split along with the heads
                rules |= {f"{norm}.weight": "colwise", f"{norm}.bias": "colwise", norm: "local_params"}
            elif config.qk_norm != "none":
                # all heads share one scale and bias, so the gradients of each process's heads are summed
                rules[norm] = "replicated_with_grad_allreduce"
    return rules


def _group_rules(config: Any, group: str) -> dict[str, str]:
    name = f"mlp.groups.{group}"
    if config.group_num_experts(group) == 1:
        rules = _mlp_rules(f"{name}.mlp")
    else:
        rules = {
            **_router_rules(config, f"{name}.router"),
            f"{name}.experts.gate_up_proj": "packed_colwise",
            f"{name}.experts.down_proj": "rowwise",
            f"{name}.experts": "moe_tp_experts",
        }
    if config.group_shared_intermediate_size(group):
        rules |= _mlp_rules(f"{name}.shared_expert")
    return rules


def _mlp_rules(name: str) -> dict[str, str]:
    return {f"{name}.gate_proj": "colwise", f"{name}.up_proj": "colwise", f"{name}.down_proj": "rowwise"}


def _router_rules(config: Any, name: str) -> dict[str, str]:
    names = [name]
    if config.auxiliary_routers:
        names += [f"{name}.auxiliary", f"{name}.auxiliary.up_proj", f"{name}.auxiliary.down_proj"]
    return dict.fromkeys(names, "replicate")
