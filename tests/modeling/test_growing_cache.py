# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from helpers.tiny import tiny_config, tiny_model
from modeling_moma.cpu_moma import MomaGrowingCacheLayer, use_growing_layer


def new_states(num_tokens: int, rows: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 3, num_tokens, 4, generator=generator).to(dtype) for _ in range(2)]


@torch.no_grad()
def both_after(steps: list[int]):
    """A plain and a growing layer that were given the same tokens, and what each answered last."""
    layers, answers = (DynamicLayer(), MomaGrowingCacheLayer()), [None, None]
    for seed, num_tokens in enumerate(steps):
        states = new_states(num_tokens, seed=seed)
        answers = [layer.update(*(x.clone() for x in states)) for layer in layers]
    return layers, answers


def assert_same(layers, answers=None):
    plain, growing = layers
    for name in ("keys", "values"):
        assert torch.equal(getattr(plain, name), getattr(growing, name))
    assert plain.get_seq_length() == growing.get_seq_length()
    if answers is not None:
        assert all(torch.equal(mine, other) for mine, other in zip(*answers))


@pytest.mark.parametrize("steps", [[5], [5, 1, 1], [3, *[1] * 80], [1, 40, 2, 1]])
def test_it_holds_what_a_plain_layer_holds(steps):
    layers, answers = both_after(steps)
    assert_same(layers, answers)


def test_steps_write_behind_what_is_there():
    (_, growing), _ = both_after([40, 1])
    memory = growing.keys.untyped_storage().data_ptr()
    before = growing.keys.clone()
    with torch.no_grad():
        growing.update(*new_states(1))
    assert growing.keys.untyped_storage().data_ptr() == memory
    assert torch.equal(growing.keys[:, :, :41], before)
    # a quarter to spare, or 32 columns where that is more
    assert growing.keys.untyped_storage().nbytes() == 2 * 3 * (41 + 32) * 4 * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-2),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.reset(),
    ],
)
@torch.no_grad()
def test_what_sets_the_states_anew_gives_the_room_up(change):
    layers, _ = both_after([6, 1, 1])
    seen = layers[1].keys
    kept = seen.clone()
    for layer in layers:
        change(layer)
    rows = 2 if not layers[0].is_initialized else layers[0].keys.shape[0]
    for layer in layers:
        layer.update(*new_states(1, rows=rows, seed=9))
    assert_same(layers)
    # what somebody else still holds was not written over
    assert torch.equal(seen, kept)


@torch.no_grad()
def test_copies_go_their_own_ways():
    (_, growing), _ = both_after([6, 1])
    other = copy.deepcopy(growing)
    growing.update(*new_states(1, seed=1))
    other.update(*new_states(1, seed=2))
    assert torch.equal(growing.keys[:, :, :7], other.keys[:, :, :7])
    assert torch.equal(growing.keys[:, :, 7:], new_states(1, seed=1)[0])
    assert torch.equal(other.keys[:, :, 7:], new_states(1, seed=2)[0])


def test_states_of_other_shapes_are_refused_as_by_a_plain_layer():
    (_, growing), _ = both_after([6, 1])
    with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        growing.update(*new_states(1, rows=1))


def test_room_of_inference_mode_is_not_written_outside_it():
    layer = MomaGrowingCacheLayer()
    with torch.inference_mode():
        layer.update(*new_states(4))
        layer.update(*new_states(1))
    with torch.no_grad():
        keys, _ = layer.update(*new_states(1, seed=3))
    assert torch.equal(keys[:, :, 5:], new_states(1, seed=3)[0]) and keys.shape[2] == 6


def test_gradients_flow_through_steps():
    layer = MomaGrowingCacheLayer()
    first, second = (new_states(1, seed=seed) for seed in (0, 1))
    for x in (*first, *second):
        x.requires_grad_()
    layer.update(*first)
    keys, _ = layer.update(*second)
    keys.sum().backward()
    assert torch.equal(first[0].grad, torch.ones_like(first[0]))


def test_a_forward_lets_plain_layers_grow_and_leaves_others():
    model = tiny_model().eval()
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7]]), cache=cache, use_cache=True)
        assert {type(layer) for layer in cache.layers} == {MomaGrowingCacheLayer}
    with_depth = DynamicCache(config=tiny_config(depth_layers=[0]))
    kinds = [type(layer) for layer in with_depth.layers]
    for layer_idx in range(2):
        use_growing_layer(with_depth, layer_idx)
    assert type(with_depth.layers[0]) is kinds[0] is not DynamicLayer
    assert type(with_depth.layers[1]) is MomaGrowingCacheLayer
