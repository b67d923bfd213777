# SPDX-License-Identifier: Apache-2.0
import copy
import json
import warnings

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from helpers.reference import GROUPS
from helpers.tiny import IMAGE_IDS, mixed_ids, tiny_config
from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.modeling_moma import MomaForCausalLM


POOL = {"num_experts": 4, "training_routing": "token_choice", "balance_bias_by_modality": True}
BAD = [
    ("vocab_size", {"vocab_size": 0}),
    ("hidden_size", {"hidden_size": 15}),
    ("num_key_value_heads", {"num_attention_heads": 4, "num_key_value_heads": 3}),
    ("head_dim", {"head_dim": 5}),
    ("attention_dropout", {"attention_dropout": 1.0}),
    ("rms_norm_eps", {"rms_norm_eps": float("inf")}),
    ("initializer_range", {"initializer_range": -0.1}),
    ("hidden_act", {"hidden_act": "prelu"}),
    *(
        ("rope_parameters", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **change}})
        for change in ({"partial_rotary_factor": 0.5}, {"rope_theta": 0}, {"rope_theta": "1e4"}, {"rope_type": "nope"})
    ),
    ("pad_token_id", {"pad_token_id": 40}),
    ("eos_token_id", {"eos_token_id": [2, 40]}),
    *(
        ("modality_token_ranges", {"modality_token_ranges": ranges})
        for ranges in (
            {"text": [[0, 4]], "image": [[8, 24]]},
            {"image": [[24, 8]]},
            {"image": [[8, 41]]},
            {"image": [[8, 16, 24]]},
            {"image": [[8, 24], [20, 23]]},
            {"interleaved": [[8, 24]]},
        )
    ),
    # special tokens among the codes, as those of the defaults are where codes begin at 0
    ("pad_token_id. = 1: lies inside", {"modality_token_ranges": {"image": [[0, 16]]}}),
    ("eos_token_id. = .2, 23.: lies inside", {"eos_token_id": [2, 23]}),
    ("eos_token_id. = 24: begins a frame", {"eos_token_id": 24}),
    ("begin_image_token_id", {"begin_image_token_id": 25}),
    ("end_image_token_id", {"end_image_token_id": 10}),
    ("image_seq_length", {"image_seq_length": 63}),
    ("num_experts", {"num_experts": 0}),
    ("num_experts", {"num_experts": {"text": 4}}),
    ("expert_capacity_factor", {"expert_capacity_factor": 0.0}),
    ("expert_capacity_factor", {"expert_capacity_factor": 4.5}),
    ("expert_intermediate_size", {"num_experts": 8, "expert_intermediate_size": {"text": 16}}),
    ("expert_intermediate_size", {"expert_intermediate_size": {"text": 0}}),
    ("shared_expert_intermediate_size", {"shared_expert_intermediate_size": 0}),
    ("num_experts_per_tok", {"num_experts_per_tok": 0}),
    ("num_experts_per_tok", {"num_experts_per_tok": 5, "training_routing": "token_choice"}),
    ("norm_placement", {"norm_placement": "sandwich"}),
    ("gate_after_norm", {"gate_after_norm": True, "norm_placement": "pre"}),
    ("untied_attention", {"untied_attention": True, "num_experts": 8}),
    ("balance_bias_by_modality", {**POOL, "num_experts": {"text": 4, "image": 4}}),
    ("balance_bias_by_modality", {**POOL, "training_routing": "expert_choice"}),
    ("training_routing", {"training_routing": "hash"}),
    ("training_routing", {"training_routing": "auxiliary", "auxiliary_routers": True}),
    ("inference_routing", {"inference_routing": "expert_choice"}),
    ("inference_routing. = 'auxiliary': .*auxiliary_routers=True", {"inference_routing": "auxiliary"}),
    ("gumbel_noise", {"gumbel_noise": float("nan")}),
    ("gumbel_noise", {"gumbel_noise": 1.0, "training_routing": "threshold"}),
    ("gumbel_noise_steps", {"gumbel_noise_steps": 0}),
    ("threshold_momentum", {"threshold_momentum": 1.0}),
    ("routing_warmup_steps", {"routing_warmup_steps": -1}),
    ("modality_loss_weights", {"modality_loss_weights": {"text": -1.0}}),
    *(("depth_layers", {"depth_layers": layers}) for layers in ([2], [-1], [1, 0], [0, 0])),
    *(
        ("depth_capacity", {"depth_layers": [0], "depth_capacity": capacity})
        for capacity in (0.0, 1.5, {"text": 0.5}, {"text": 0.5, "image": 0.0})
    ),
    ("depth_training_routing", {"depth_layers": [0], "depth_training_routing": "hash"}),
    ("depth_inference_routing", {"depth_layers": [0], "depth_inference_routing": "expert_choice"}),
    ("auxiliary_routers=True", {"depth_layers": [0], "depth_inference_routing": "auxiliary"}),
]
OTHERS = {
    "uneven": GROUPS["6t2i"],
    "shared_by_modality": GROUPS["shared_by_modality"],
    "bias": {"attention_bias": True, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6},
    "qk_rms": {"qk_norm": "rmsnorm"},
    "qk_none": {"qk_norm": "none", "norm_placement": "pre"},
    "untied_three_modalities": {
        "untied_attention": True,
        "modality_token_ranges": {"image": [[8, 20]], "audio": [[30, 40]]},
        "num_experts": {"text": 2, "image": 3, "audio": 1},
        "qk_norm": "layernorm_per_head",
        "depth_layers": [1],
    },
    "biases_by_modality": POOL,
    "depth_dense_tied": {"depth_layers": [0], "num_experts": 1, "tie_word_embeddings": True},
    "auxiliary_mixed_of_odd_width": {"auxiliary_routers": True, "num_experts": 8, "hidden_size": 17, "head_dim": 6},
    "auxiliary_depth": {
        "auxiliary_routers": True,
        "depth_layers": [0, 1],
        "depth_capacity": {"text": 0.5, "image": 0.1},
    },
}


@pytest.mark.parametrize(("name", "change"), BAD)
def test_a_contradiction_raises_and_names_its_field(name, change):
    with pytest.raises(
        (StrictDataclassClassValidationError, StrictDataclassFieldValidationError, ValueError), match=name
    ):
        tiny_config(**change)


@pytest.mark.parametrize(
    ("name", "default", "other"), [("depth_pool", "batch", "row"), ("depth_threshold_momentum", 0.5, 0.98)]
)
def test_a_field_that_is_no_more_loads_at_its_old_default_alone(name, default, other):
    loaded = MomaConfig(**{**tiny_config().to_dict(), name: default})
    assert name not in loaded.to_dict()
    with pytest.raises(ValueError, match=f"`{name}` = {other!r}: the field is no more"):
        tiny_config(**{name: other})


@pytest.mark.parametrize(
    "fields",
    [
        {"modality_loss_weights": {"text": 2}},
        {"expert_capacity_factor": {"text": 1, "image": 2}},
        {"depth_layers": [0], "depth_capacity": {"text": 1, "image": 0.5}},
        {"z_loss_coef": 0, "threshold_momentum": 0, "router_bias_update_rate": 0},
    ],
    ids=lambda fields: list(fields)[-1],
)
def test_whole_numbers_are_as_good_as_fractions(fields, tmp_path):
    config = tiny_config(**fields)
    config.save_pretrained(tmp_path)
    for name, value in fields.items():
        assert getattr(MomaConfig.from_pretrained(tmp_path), name) == value
    loss = MomaForCausalLM(config)(mixed_ids(), labels=mixed_ids()).loss
    assert torch.isfinite(loss)


def test_noise_without_threshold_training_is_fine():
    for routing in ("expert_choice", "token_choice"):
        assert tiny_config(gumbel_noise=1, training_routing=routing).gumbel_noise == 1
    # depth routers have no noise
    assert tiny_config(gumbel_noise=0.5, depth_layers=[0], depth_training_routing="threshold").gumbel_noise == 0.5


def test_the_default_configuration_is_silent(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = MomaConfig()
    assert capfd.readouterr() == ("", "")
    assert config.num_experts == {"text": 4, "image": 4}


@pytest.mark.parametrize(
    ("preset", "printed"),
    [
        ("moma-90m-dense", "92.3M"),
        ("moma-90m-8x", "209.7M"),
        ("moma-435m-8x", "1845M"),
        ("moma-1.4b-8x", "7113M"),
        ("moma-mod-110m-8x", "316.6M"),
        ("moma-mod-635m-8x", "2986M"),
        ("moma-mod-2.3b-8x", "11853M"),
    ],
)
def test_presets_have_the_parameters_of_table_1(preset, printed):
    config = MomaConfig.from_preset(preset)
    millions = config.num_parameters(exclude_norms_and_routers=True) / 1e6
    assert (f"{millions:.1f}M" if millions < 1000 else f"{millions:.0f}M") == printed


@pytest.mark.parametrize("size", ["90m", "435m", "1.4b", "mod-110m", "mod-635m", "mod-2.3b"])
def test_experts_by_modality_are_as_many_as_mixed_ones(size):
    mixed, by_modality = (MomaConfig.from_preset(f"moma-{size}-{experts}") for experts in ("8x", "4t4i"))
    assert mixed.num_parameters() == by_modality.num_parameters()


@pytest.mark.parametrize(("size", "num_layers"), [("110m", 14), ("635m", 40), ("2.3b", 32)])
def test_presets_of_depth_skip_in_every_other_layer(size, num_layers):
    config = MomaConfig.from_preset(f"moma-mod-{size}-4t4i")
    assert config.num_hidden_layers == num_layers
    assert config.depth_layers == list(range(0, num_layers, 2))
    assert config.depth_capacity == 0.25


@pytest.mark.parametrize("preset", ["moma-435m-dense", "moma-90m-1t1i", "moma-90m-8x", "moma-mod-110m-4t4i"])
def test_the_closed_form_equals_the_built_preset(preset):
    check_count(MomaConfig.from_preset(preset))


@pytest.mark.parametrize("name", OTHERS)
def test_the_closed_form_equals_other_built_models(name):
    check_count(tiny_config(**OTHERS[name]))


def check_count(config):
    with torch.device("meta"):
        model = MomaForCausalLM(config)
    model.tie_weights()
    assert config.num_parameters() == sum(parameter.numel() for parameter in set(model.parameters()))


def test_active_parameters_are_those_of_the_dense_model():
    dense = MomaConfig.from_preset("moma-90m-dense").num_parameters()
    for experts in ("1t1i", "8x", "4t4i"):
        config = MomaConfig.from_preset(f"moma-90m-{experts}")
        routers = config.num_hidden_layers * config.hidden_size * (8 if experts == "8x" else 4)
        assert config.num_parameters(active=True) == dense + (0 if experts == "1t1i" else routers)


def test_active_parameters_count_the_experts_of_each_token():
    k, fields = 2, {"hidden_size": 16, "intermediate_size": 32, "num_experts": 4}
    rules = {"training_routing": "expert_choice", "inference_routing": "token_choice"}
    config = tiny_config(**fields, **rules, num_experts_per_tok=k, expert_capacity_factor=3.0)
    unused = config.num_hidden_layers * (4 - k) * 3 * 16 * 32
    assert config.num_parameters(active=True) == config.num_parameters() - unused
    # other rules do not read it
    by_threshold = tiny_config(**fields, num_experts_per_tok=k)
    assert by_threshold.num_parameters(active=True) == tiny_config(**fields).num_parameters(active=True)


def test_a_group_of_one_expert_bounds_nothing():
    rules = {"training_routing": "token_choice", "inference_routing": "token_choice"}
    mixed = tiny_config(num_experts={"text": 1, "image": 4}, num_experts_per_tok=2, **rules)
    assert mixed.num_parameters(active=True, modality="text") < mixed.num_parameters(active=True, modality="image")
    tiny_config(num_experts={"text": 1, "image": 4}, expert_capacity_factor=2.0)
    with pytest.raises(StrictDataclassClassValidationError, match="exceeds the smallest group of experts .4."):
        tiny_config(num_experts={"text": 1, "image": 4}, num_experts_per_tok=5, **rules)
    with pytest.raises(StrictDataclassClassValidationError, match="`expert_capacity_factor` = 4.5"):
        tiny_config(num_experts={"text": 1, "image": 4}, expert_capacity_factor=4.5)


def test_auxiliary_routers_count_as_routers():
    fields = {**GROUPS["6t2i"], "depth_layers": [0]}
    plain, auxiliary = (tiny_config(**fields, auxiliary_routers=flag) for flag in (False, True))
    # two layers of experts and one depth router, each with a matrix of [8, 16] and one of [scores, 8]
    text, image, depth = (8 * (16 + scores) for scores in (6, 2, 1))
    assert auxiliary.num_parameters() - plain.num_parameters() == 2 * (text + image) + depth
    for active in (False, True):
        counts = [config.num_parameters(active, exclude_norms_and_routers=True) for config in (plain, auxiliary)]
        assert counts[0] == counts[1]


def test_active_parameters_count_the_share_of_depth_layers():
    plain, depth = (
        tiny_config(num_experts=1, num_hidden_layers=4, depth_layers=layers, depth_capacity=0.25)
        for layers in (None, [0, 3])
    )
    matrices = 4 * 16 * 16 + 3 * 16 * 32
    for exclude, layer, routers in ((True, matrices, 0), (False, matrices + 2 * 16 + 4 * 8, 2 * 16)):
        full = plain.num_parameters(exclude_norms_and_routers=exclude)
        assert depth.num_parameters(exclude_norms_and_routers=exclude) == full + routers
        active = depth.num_parameters(active=True, exclude_norms_and_routers=exclude)
        assert active == full - 2 * 0.75 * layer + routers


def test_active_parameters_differ_by_modality():
    config = tiny_config(**GROUPS["6t2i"])
    text, image = (config.num_parameters(active=True, modality=name) for name in config.modalities)
    assert text != image
    assert config.num_parameters(active=True) == max(text, image)
    with pytest.raises(ValueError, match="modality"):
        config.num_parameters(active=True, modality="audio")


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="moma-435m-4t4i"):
        MomaConfig.from_preset("moma-90m-16x")


AUDIO = {"modality_token_ranges": {"image": [[8, 24]], "audio": [[30, 36]]}, "num_experts": 2}


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ({"image": {"begin": 26, "end": 27, "length": 4}}, "begin_image_token_id, end_image_token_id"),
        ({"text": {"begin": 26, "end": 27, "length": 4}}, r"names no modality .* \['audio'\]"),
        ({"audio": {"begin": 26, "end": 27}}, r"exactly the keys \['begin', 'end', 'length'\]"),
        ({"audio": {"begin": 26, "end": 27, "length": 63}}, r"must fit max_position_embeddings \(64\)"),
        ({"audio": {"begin": 26, "end": 40, "length": 4}}, r"'end' must be an id below vocab_size \(40\)"),
        ({"audio": {"begin": 10, "end": 27, "length": 4}}, "'begin' lies inside modality_token_ranges"),
        ({"audio": {"begin": 24, "end": 27, "length": 4}}, "'begin' is also begin_image_token_id"),
    ],
)
def test_frames_that_cannot_be_are_refused_by_name(frames, message):
    with pytest.raises(StrictDataclassClassValidationError, match=f"`modality_frames` = .*{message}"):
        tiny_config(**AUDIO, modality_frames=frames)


def test_frames_are_one_record_per_modality_in_order():
    config = tiny_config(**AUDIO, modality_frames={"audio": {"begin": 26, "end": 27, "length": None}})
    assert list(config.frames) == ["audio", "image"]
    audio, image = config.frames.values()
    assert (audio.ranges, audio.begin, audio.end, audio.length) == (((30, 36),), 26, 27, None)
    assert (image.ranges, image.begin, image.end, image.length) == (((8, 24),), 24, 25, 4)
    assert list(tiny_config(**AUDIO).frames) == ["image"]
    assert tiny_config(**AUDIO, begin_image_token_id=None).frames == {}


def test_fields_of_every_form_survive_saving(tmp_path):
    changed = {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        "eos_token_id": [5, 6],
        "num_experts": {"text": 3, "image": 2, "audio": 2},
        "expert_intermediate_size": {"image": 12},
        "shared_expert_intermediate_size": {"text": 10},
        "expert_capacity_factor": {"text": 1.5},
        "modality_token_ranges": {"image": [[10, 20], [30, 34]], "audio": [[36, 40]]},
        "modality_frames": {"audio": {"begin": 35, "end": 26, "length": None}},
        "routing_warmup_steps": 7,
        "modality_loss_weights": {"text": 2.0},
        "depth_capacity": {"text": 0.5, "image": 0.25, "audio": 1.0},
    }
    config = tiny_config(**changed, depth_layers=[0])
    config.save_pretrained(tmp_path)
    loaded = MomaConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in changed} == changed
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize("depth_layers", [None, [0, 2]])
def test_the_layers_cache_types_are_derived_and_never_saved(depth_layers, tmp_path):
    config = tiny_config(num_hidden_layers=4, depth_layers=depth_layers)
    expected = ["moma_depth" if layer in (depth_layers or []) else "full_attention" for layer in range(4)]
    assert config.layer_types == expected
    assert "layer_types" not in config.to_diff_dict()
    config.save_pretrained(tmp_path)
    assert "layer_types" not in json.loads((tmp_path / "config.json").read_text())
    loaded = MomaConfig.from_pretrained(tmp_path)
    assert (loaded.layer_types, loaded.depth_layers) == (expected, depth_layers)
    # another choice of layers must not meet stale types
    loaded.depth_layers = [1]
    assert loaded.layer_types == ["full_attention", "moma_depth", "full_attention", "full_attention"]
    assert copy.deepcopy(loaded).layer_types == loaded.layer_types


def test_modalities_start_with_text_and_go_on_by_name():
    config = tiny_config(num_experts=2)
    config.modality_token_ranges = {"speech": [[30, 40]], "image": [list(IMAGE_IDS)]}
    assert config.modalities == ["text", "image", "speech"]
    assert config.expert_groups == {"all": ["text", "image", "speech"]}
