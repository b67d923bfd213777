# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from helpers.reference import fields_of
from helpers.tiny import randomize_auxiliary
from modeling_moma.configuration_moma import MomaConfig, rule_names
from modeling_moma.depth_moma import MomaDepthRouter
from modeling_moma.modeling_moma import MomaForCausalLM
from modeling_moma.routing_moma import MomaRouter


EXPERTS = {"dense": 1, "1t1i": {"text": 1, "image": 1}, "8x": 8, "4t4i": {"text": 4, "image": 4}}
VOCABULARY, LENGTH = 200, 24
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


DEPTH = {
    "mod": {"num_hidden_layers": 4, "depth_layers": [0, 2]},
    "mod_by_modality": {
        "num_hidden_layers": 4,
        "depth_layers": [0, 2],
        "depth_capacity": {"text": 0.5, "image": 0.25},
    },
}


def make_model(experts, norm_placement, routing, depth=None):
    torch.manual_seed(0)
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 21,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "begin_image_token_id": 3,
        "end_image_token_id": 4,
        "image_seq_length": 8,
        "modality_token_ranges": {"image": [[100, VOCABULARY]]},
        "num_experts": EXPERTS[experts],
        "norm_placement": norm_placement,
        "inference_routing": routing,
        "initializer_range": 0.1,
        **fields_of(routing),
    }
    model = MomaForCausalLM(MomaConfig(**{**fields, **DEPTH.get(depth, {})})).eval()
    for module in model.modules():
        if isinstance(module, MomaRouter):
            module.threshold.uniform_(0.4, 0.6)
            module.balance_bias.uniform_(-0.1, 0.1)
        if isinstance(module, MomaDepthRouter):
            module.threshold.uniform_(0.49, 0.51)
            module.balance_bias.uniform_(-0.01, 0.01)
    randomize_auxiliary(model)
    return model


CASES = [
    ("dense", "pre", "threshold"),
    ("1t1i", "post", "threshold"),
    ("8x", "pre", "auxiliary"),
    ("8x", "post", "token_choice"),
    *(("4t4i", "post", routing) for routing in rule_names(is_causal=True)),
    ("dense", "post", "token_choice", "mod"),
    *(("4t4i", "post", routing, "mod") for routing in rule_names(is_causal=True)),
    ("4t4i", "post", "threshold", "mod_by_modality"),
    ("4t4i", "post", "auxiliary", "mod_by_modality"),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request):
    return make_model(*request.param)


def random_ids(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (rows, length), generator=generator)


@torch.no_grad()
def test_later_tokens_move_no_logit_at_or_before(model):
    ids = random_ids(3, LENGTH)
    logits = model(ids).logits
    for last_kept in (0, 7, LENGTH - 2):
        changed = ids.clone()
        changed[:, last_kept + 1 :] = random_ids(3, LENGTH - last_kept - 1, seed=1)
        moved = model(changed).logits
        torch.testing.assert_close(moved[:, : last_kept + 1], logits[:, : last_kept + 1], **TOLERANCE)
        assert not torch.allclose(moved[:, last_kept + 1 :], logits[:, last_kept + 1 :], atol=1e-3)


@torch.no_grad()
def test_batch_mates_move_no_logit(model):
    ids = random_ids(4, LENGTH)
    logits = model(ids).logits
    for row in range(4):
        torch.testing.assert_close(model(ids[row : row + 1]).logits, logits[row : row + 1], **TOLERANCE)
    # mates of one modality alone
    mates = torch.cat([ids[:1], ids[1:].clamp(max=99)])
    torch.testing.assert_close(model(mates).logits[:1], logits[:1], **TOLERANCE)


@torch.no_grad()
def test_left_padding_moves_no_logit(model):
    ids = random_ids(3, LENGTH)
    lengths = (LENGTH, LENGTH - 3, LENGTH - 7)
    padded, mask = ids.clone(), torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padded[row, : LENGTH - length] = 0
        mask[row, : LENGTH - length] = 0
    logits = model(padded, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, -length:]).logits
        torch.testing.assert_close(logits[row : row + 1, -length:], alone, **TOLERANCE)


@torch.no_grad()
def test_right_padding_moves_no_logit(model):
    ids = random_ids(3, LENGTH)
    lengths = (LENGTH, LENGTH - 3, LENGTH - 7)
    mask = (torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(-1)).long()
    logits = model(ids * mask, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length]).logits
        torch.testing.assert_close(logits[row : row + 1, :length], alone, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("routing", ["threshold", "auxiliary"])
def test_random_thresholds_mix_the_selections(routing):
    model = make_model("4t4i", "post", routing)
    counts = set()

    def count_experts(module, arguments, output):
        selection = output[1]
        tokens = torch.bincount(selection.token_P, minlength=arguments[0].shape[0])
        counts.update(tokens.tolist())

    hooks = [m.register_forward_hook(count_experts) for m in model.modules() if isinstance(m, MomaRouter)]
    model(random_ids(3, LENGTH))
    for hook in hooks:
        hook.remove()
    assert {0, 1, 2, 3} <= counts


@torch.no_grad()
@pytest.mark.parametrize("argument", ["routing", "depth_routing"])
def test_expert_choice_is_the_one_that_sees_the_future(argument):
    model = make_model("4t4i", "post", "threshold", "mod" if argument == "depth_routing" else None)
    ids = random_ids(3, LENGTH)
    changed = ids.clone()
    changed[:, 12:] = random_ids(3, 12, seed=1)
    before, after = (model(tokens, **{argument: "expert_choice"}).logits[:, :12] for tokens in (ids, changed))
    assert not torch.allclose(before, after, atol=1e-3)
