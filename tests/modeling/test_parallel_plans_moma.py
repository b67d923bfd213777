# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers.distributed import DistributedConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

from helpers.reference import GROUPS
from helpers.tiny import IMAGE_IDS, tiny_config
from modeling_moma import MomaConfig, MomaForCausalLM, MomaModel


DEPTH = {"depth_layers": [1], "depth_capacity": {"text": 0.5, "image": 0.25}}
VARIANTS = {
    **GROUPS,
    "three_modalities": {
        "num_experts": {"text": 4, "image": 2, "speech": 1},
        "modality_token_ranges": {"image": [list(IMAGE_IDS)], "speech": [[36, 40]]},
        "shared_expert_intermediate_size": {"speech": 24},
    },
    "depth_dense": {"num_experts": 1, "depth_layers": [0, 1]},
    "auxiliary": {**GROUPS["4t4i"], **DEPTH, "auxiliary_routers": True},
    "tied": {**GROUPS["4t4i"], "tie_word_embeddings": True},
    "biases_by_modality": {**GROUPS["8x"], "balance_bias_by_modality": True, "training_routing": "token_choice"},
    "untied": {**GROUPS["4t4i"], **DEPTH, "untied_attention": True, "attention_bias": True},
    "untied_per_head": {**GROUPS["1t1i"], "untied_attention": True, "qk_norm": "layernorm_per_head"},
    **{f"qk_norm_{norm}": {"qk_norm": norm} for norm in ("layernorm", "layernorm_per_head", "rmsnorm", "none")},
}


def build(name, model_class=MomaForCausalLM):
    with torch.device("meta"):
        return model_class(tiny_config(**VARIANTS[name]))


@pytest.mark.parametrize("given", [{"pp_size": 2}, DistributedConfig(pp_size=2)])
def test_pipelines_are_refused_since_later_stages_get_no_ids(given):
    assert not build("4t4i").supports_pp_plan
    with pytest.raises(ValueError, match="`pp_size` is 2, but a MoMa needs 1"):
        MomaForCausalLM.prepare_distribute_model(given)
    assert MomaForCausalLM.prepare_distribute_model(None) == (None, None, None)


def rule_of(parameter, plan):
    """The rule that shards a parameter: its own, or that of its module."""
    name = replace_layer_number_by_wildcard(parameter)
    return plan.get(name, plan.get(name.rpartition(".")[0]))


@pytest.mark.parametrize("model_class", [MomaForCausalLM, MomaModel])
@pytest.mark.parametrize("name", VARIANTS)
def test_plans_cover_every_parameter(name, model_class):
    model = build(name, model_class)
    for parameter, value in model.named_parameters():
        rule = rule_of(parameter, model.tp_plan)
        assert rule is not None, parameter
        # matrices of any size are split, and what decides between experts is not
        is_large = value.ndim > 1 and "router." not in parameter
        assert (rule not in ("replicate", "replicated_with_grad_allreduce")) == is_large or value.ndim == 1, parameter
        assert rule_of(parameter, model.ep_plan) == ("grouped_gemm" if ".experts." in parameter else None), parameter


@pytest.mark.parametrize("name", VARIANTS)
def test_no_rule_is_without_a_module_or_parameter(name):
    model = build(name)
    names = [key for pairs in (model.named_modules(), model.named_parameters()) for key, _ in pairs]
    names = {replace_layer_number_by_wildcard(key) for key in names}
    for plan in (model.tp_plan, model.ep_plan):
        assert not plan.keys() - names
        assert not set(plan.values()) - set(ALL_PARALLEL_STYLES)


@pytest.mark.parametrize("name", ["dense", "1t1i"])
def test_without_packed_experts_there_is_no_expert_plan(name):
    assert tiny_config(**VARIANTS[name]).base_model_ep_plan is None


def test_plans_are_not_saved(tmp_path):
    config = tiny_config(**GROUPS["4t4i"])
    config.save_pretrained(tmp_path)
    assert "_plan" not in (tmp_path / "config.json").read_text()
    assert MomaConfig.from_pretrained(tmp_path).base_model_tp_plan == config.base_model_tp_plan
