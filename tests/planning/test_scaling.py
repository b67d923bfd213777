# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from modeling_moma import devices_moma
from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.modeling_moma import MomaExperts, MomaForCausalLM
from modeling_moma.planning.layouts import (
    Collective,
    Layout,
    activation_bytes,
    experts_per_token,
    parameter_parts,
    training_memory,
    training_traffic,
)


SIZES = {
    "vocab_size": 1200,
    "hidden_size": 240,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "max_position_embeddings": 512,
    "modality_token_ranges": {"image": [[8, 520]]},
    "begin_image_token_id": 6,
    "end_image_token_id": 7,
    "image_seq_length": 64,
    "pad_token_id": None,
}
CONFIGS = {
    "4t4i": {},
    "dense": {"num_experts": 1, "tie_word_embeddings": True, "attention_bias": True},
    "1t1i": {"num_experts": {"text": 1, "image": 1}, "qk_norm": "none"},
    "8x": {"num_experts": 8, "norm_placement": "pre", "qk_norm": "rmsnorm"},
    "4t1i": {"num_experts": {"text": 4, "image": 1}, "qk_norm": "layernorm_per_head"},
    "gate": {"gate_after_norm": True},
    "two": {"expert_capacity_factor": 2.0},
    "shared": {"shared_expert_intermediate_size": 200},
    "shared_by_modality": {"shared_expert_intermediate_size": {"text": 200, "image": 200}},
    "untied": {"untied_attention": True},
    "token_choice": {"training_routing": "token_choice"},
    "two_per_token": {"training_routing": "token_choice", "num_experts_per_tok": 2},
    "depth": {"depth_layers": [0, 2], "auxiliary_routers": True},
    "half_depth": {"depth_layers": [0, 2], "depth_capacity": 0.5, "num_experts": 1},
}
TOKENS = 512
LAYOUTS = [Layout(), Layout(8), Layout(1, 8), Layout(2, 4), Layout(2, 4, 1, 4), Layout(1, 2, 2, 2)]


def config_of(name):
    return MomaConfig(**{**SIZES, **CONFIGS[name]})


def presets():
    return [name for name in MomaConfig.preset_names() if "90m" in name or "mod-110m" in name]


@pytest.mark.parametrize("name", [*CONFIGS, *presets()])
def test_parts_of_the_parameters_are_those_of_a_built_model(name):
    config = config_of(name) if name in CONFIGS else MomaConfig.from_preset(name)
    parts = parameter_parts(config)
    with torch.device("meta"):
        model = MomaForCausalLM(config)
    # a layer without depth router, if there is one
    layer = model.model.layers[1]
    named = {parameter_name: parameter.numel() for parameter_name, parameter in layer.named_parameters()}
    experts = sum(count for name, count in named.items() if "experts" in name.split("."))
    whole = sum(
        count for name, count in named.items() if any(part.endswith(("norm", "router")) for part in name.split("."))
    )
    assert parts.experts == experts
    assert parts.replicated == whole
    assert parts.matrices == sum(named.values()) - experts - whole
    weights = [model.model.embed_tokens.weight, model.lm_head.weight]
    assert parts.ends == sum(weight.numel() for weight in weights[: 1 if config.tie_word_embeddings else 2])


@pytest.mark.parametrize("name, layout", [*zip(["4t4i", "8x", "shared"] * 2, LAYOUTS), ("depth", LAYOUTS[3])], ids=str)
def test_weights_of_all_gpus_make_up_the_copies_of_the_model(name, layout):
    config = config_of(name)
    memory = training_memory(config, layout, TOKENS)
    parts = parameter_parts(config)
    held = layout.gpus / layout.replicate * memory.weights / 4
    # norms and routers are whole on each rank of a tensor-parallel group; the last norm and depth routers are too few
    replicas = (layout.tensor - 1) * config.num_hidden_layers * parts.replicated
    assert held == pytest.approx(config.num_parameters() + replicas, rel=0.001 if name != "depth" else 0.03)
    assert memory.gradients == memory.weights
    assert memory.moments == 2 * memory.weights
    assert memory.total == pytest.approx(4 * memory.weights + memory.working + memory.activations)


def test_working_weights_under_fsdp_are_two_layers_and_the_ends():
    config = config_of("4t4i")
    parts = parameter_parts(config)
    whole = training_memory(config, Layout(1, 4), TOKENS).working
    layer = parts.matrices + parts.experts + parts.replicated
    assert whole == 2 * (3 * layer + 2 * parts.ends)
    split = training_memory(config, Layout(1, 4, 1, 4), TOKENS).working
    assert whole - split == pytest.approx(2 * 3 * parts.experts * 3 / 4)


def saved_bytes(config, checkpointing=False):
    """Bytes that the backward pass of a real model keeps, weights and their casts left out."""
    torch.manual_seed(0)
    model = MomaForCausalLM(config).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.arange(8, 264), torch.arange(520, 776)])
    ids = ids[torch.randperm(TOKENS, generator=generator)].view(2, -1)
    shapes = {shape for weight in model.parameters() for shape in (weight.shape, weight.transpose(0, -1).shape)}
    # experts are turned each by itself
    shapes |= {weight.mT.shape for weight in model.parameters() if weight.ndim == 3}
    held = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.shape not in shapes and storage.data_ptr() not in held:
            # the tensor too, so that its memory is not used again
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids, use_cache=False)
    return sum(size for size, _ in storages.values())


def on_accelerator(monkeypatch):
    # a CPU keeps less
    monkeypatch.setattr(devices_moma, "_CPU", ())


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_near_what_a_built_model_keeps(name, monkeypatch):
    on_accelerator(monkeypatch)
    config = config_of(name)
    # kept are the logits and their log-softmax; their gradients come on top
    gradients = TOKENS * config.vocab_size * 4 * 2
    assert activation_bytes(config, TOKENS) - gradients == pytest.approx(saved_bytes(config), rel=0.04)


def test_activations_with_checkpointing_are_the_layers_inputs_and_the_logits(monkeypatch):
    on_accelerator(monkeypatch)
    config = config_of("4t4i")
    gradients = TOKENS * config.vocab_size * 4 * 2
    kept = saved_bytes(config, checkpointing=True)
    assert activation_bytes(config, TOKENS, checkpointing=True) - gradients == pytest.approx(kept, rel=0.04)
    # where layers are large, one of them is what is computed again
    config = MomaConfig(**{**SIZES, "vocab_size": 600, "modality_token_ranges": {"image": [[8, 520]]}})
    large = MomaConfig(**{**config.to_dict(), "intermediate_size": 8000})
    difference = activation_bytes(large, 1, checkpointing=True) - activation_bytes(large, 1, 2, checkpointing=True)
    assert difference >= 4 * 2 * 8000 / 2


@pytest.mark.parametrize("name", ["4t4i", "8x", "two", "two_per_token", "dense", "4t1i"])
def test_experts_per_token_are_the_rows_that_experts_of_a_built_model_see(name):
    config = config_of(name)
    model = MomaForCausalLM(config).train()
    rows = []
    for module in model.model.layers[0].modules():
        if isinstance(module, MomaExperts):
            module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    ids = torch.cat([torch.arange(8, 264), torch.arange(520, 776)])[None]
    model(ids)
    assert sum(rows) == experts_per_token(config) * TOKENS


def test_activations_grow_with_the_experts_of_each_token():
    by_two = config_of("two_per_token")
    assert activation_bytes(by_two, TOKENS) == activation_bytes(config_of("two"), TOKENS)
    assert activation_bytes(by_two, TOKENS) > activation_bytes(config_of("4t4i"), TOKENS)


def sent(config, layout, **kwargs):
    collectives = training_traffic(config, layout, TOKENS, **kwargs)
    return {(item.name, item.kind): item.sent for item in collectives}


def test_ddp_reduces_fp32_gradients_once_a_step():
    config = config_of("4t4i")
    parameters = config.num_parameters() - config.hidden_size
    for micro_batches in (1, 4):
        traffic = sent(config, Layout(8), micro_batches=micro_batches)
        assert traffic == {("gradients", "all_reduce"): pytest.approx(2 * 7 / 8 * 4 * parameters)}


def test_fsdp_gathers_twice_and_scatters_once_in_each_micro_batch():
    config = config_of("4t4i")
    parts = parameter_parts(config)
    traffic = sent(config, Layout(1, 8), micro_batches=3)
    experts = 3 * 2 * 3 * parts.experts * 7 / 8
    assert traffic["experts", "all_gather"] == pytest.approx(2 * experts)
    assert traffic["gradients of experts", "reduce_scatter"] == pytest.approx(experts)
    assert not any(kind == "all_reduce" for _, kind in traffic)
    hybrid = sent(config, Layout(2, 4), micro_batches=3)
    assert hybrid["gradients of experts", "all_reduce"] == pytest.approx(3 * 2 * 3 * parts.experts / 4)


def test_expert_parallelism_trades_gathered_experts_for_exchanged_tokens():
    config = config_of("4t4i")
    parts = parameter_parts(config)
    traffic = sent(config, Layout(1, 4, 1, 4))
    assert ("experts", "all_gather") not in traffic
    # 3 layers, there and back, forward and backward; of 4 ranks' tokens 3 parts leave
    tokens = 3 * 4 * TOKENS * config.hidden_size * 2 * 3 / 4
    assert traffic["tokens to experts", "all_to_all"] == tokens
    again = sent(config, Layout(1, 4, 1, 4), checkpointing=True)
    assert again["tokens to experts", "all_to_all"] == 1.5 * tokens
    # two ranks share each half of the experts
    shared = sent(config, Layout(1, 4, 1, 2))
    assert shared["experts", "all_gather"] == pytest.approx(2 * 2 * 3 * parts.experts / 2 / 2)


def test_tensor_parallelism_reduces_the_stream_twice_a_layer_and_pass():
    config = config_of("4t4i")
    traffic = sent(config, Layout(1, 1, 2))
    stream = TOKENS * config.hidden_size * 2
    assert traffic["partial sums", "all_reduce"] == pytest.approx((2 * 2 * 3 + 2) * stream)
    assert traffic["logits", "all_gather"] == pytest.approx(TOKENS * config.vocab_size)


def test_hops_are_those_of_rings_trees_and_direct_sends():
    hops = {
        kind: Collective("", kind, 1.0, 8, 1, 1, True).hops
        for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
    }
    assert hops == {"all_gather": 7, "reduce_scatter": 7, "all_reduce": 6, "all_to_all": 1}


@pytest.mark.parametrize(
    ("fields", "layout", "match"),
    [
        ({}, Layout(0), "`replicate`.*positive"),
        ({}, Layout(tensor=4), "`tensor` = 4 does not divide num_attention_heads"),
        ({"intermediate_size": 322}, Layout(tensor=2, shard=2), None),
        ({"intermediate_size": 323}, Layout(tensor=2), "the inner width of 'text' experts"),
        ({}, Layout(shard=8, expert=8), "`expert` = 8 does not divide the 4 experts of group 'text'"),
        ({"num_experts": 1}, Layout(shard=4, expert=4), "no group of several experts"),
        ({}, Layout(8, 1, 1, 4), "does not divide the shard group"),
        ({}, Layout(8, 8, 1, 4), "shard groups of 8: the 4 experts of group 'text' are not enough"),
    ],
)
def test_layouts_that_the_sizes_forbid_are_refused(fields, layout, match):
    config = MomaConfig(**{**SIZES, **fields})
    if match is None:
        return layout.check(config)
    with pytest.raises(ValueError, match=match):
        training_memory(config, layout, TOKENS)


def test_layouts_have_names():
    names = [str(layout) for layout in LAYOUTS]
    assert names == ["one copy", "DDP 8", "FSDP 8", "HSDP 2 x 4", "HSDP 2 x 4 + EP 4", "FSDP 2 + TP 2 + EP 2"]
