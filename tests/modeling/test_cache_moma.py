# SPDX-License-Identifier: Apache-2.0


import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.depth_moma import MomaDepthRouter


KINDS = ("dynamic", "static")


def make_model(**fields):
    fields = {"num_hidden_layers": 4, "max_position_embeddings": 512, "depth_layers": [0, 2], **fields}
    model = tiny_model(**fields).eval()
    for router in depth_routers(model):
        router.threshold.uniform_(0.48, 0.54)
    return model


def depth_routers(model):
    return [module for module in model.modules() if isinstance(module, MomaDepthRouter)]


def new_cache(model, kind, max_cache_len=64):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_offloading_and_prefetching_change_nothing(kind):
    model = make_model()
    cache = new_cache(model, kind)
    model(mixed_ids(3, 12, 0), cache=cache)
    for layer in (cache.layers[0], cache.layers[2]):
        before = (layer.keys.clone(), layer.values.clone(), layer.slots.clone(), list(layer.lengths))
        layer.offload()
        layer.prefetch()
        assert all(torch.equal(x, y) for x, y in zip(before, (layer.keys, layer.values, layer.slots)))
        assert layer.lengths == before[3] and layer.get_seq_length() == 12


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "forget", "hidden", "then_hidden"),
    [
        ("dynamic", "reset", 3, 3),
        ("static", "reset", 0, 2),
        ("dynamic", "crop", 3, 0),
        ("static", "crop", 2, 3),
    ],
)
def test_a_cache_that_was_emptied_knows_nothing_of_what_was_hidden(kind, forget, hidden, then_hidden):
    model, ids = make_model(), mixed_ids(2, 10, 0)
    for router in depth_routers(model):
        router.threshold.fill_(0.3)
    mask, then_mask = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 10, dtype=torch.long)
    mask[0, :hidden], then_mask[1, :then_hidden] = 0, 0
    used, fresh = new_cache(model, kind), new_cache(model, kind)
    model(ids[:, :8], attention_mask=mask, cache=used)
    used.reset() if forget == "reset" else used.crop(-8)
    for cache in (used, fresh):
        # what is hidden now was seen before without a mask
        model(ids[:, :8], cache=cache)
    logits, expected = (model(ids[:, 8:9], attention_mask=then_mask[:, :9], cache=c).logits for c in (used, fresh))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    used.reset() if forget == "reset" else used.crop(-9)
    whole = model(ids, attention_mask=then_mask, cache=used).logits[:, -1]
    torch.testing.assert_close(whole, model(ids, attention_mask=then_mask).logits[:, -1], atol=4e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_hides_other_tokens_after_a_crop_is_not_taken_for_the_same(kind):
    model, ids = make_model(), mixed_ids(2, 7, 0)
    for router in depth_routers(model):
        router.threshold.fill_(0.3)
    first, then = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    first[0, 6:], then[0, :2] = 0, 0
    cropped, fresh = new_cache(model, kind), new_cache(model, kind)
    model(torch.cat((ids[:, :6], ids[:, :2]), dim=1), attention_mask=first, cache=cropped)
    cropped.crop(-2)
    model(ids[:, :6], cache=fresh)
    logits, expected = (model(ids[:, 6:], attention_mask=then, cache=cache).logits for cache in (cropped, fresh))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 2.0], ids=["all chosen", "none chosen"])
def test_cache_without_the_config_raises_and_says_what_to_do(threshold):
    model = make_model()
    for router in depth_routers(model):
        router.threshold.fill_(threshold)
    plain = make_model(depth_layers=None)
    for cache in (DynamicCache(), DynamicCache(config=plain.config), StaticCache(plain.config, 64)):
        with pytest.raises(TypeError, match=r"DynamicCache\(config=model\.config\)"):
            model(mixed_ids(2, 3, 0), cache=cache)


@torch.no_grad()
@pytest.mark.parametrize(("count", "kind"), [(1, "dynamic"), (-4, "static")])
def test_crop_by_a_bad_number_raises(kind, count):
    model = make_model()
    cache = new_cache(model, kind)
    model(mixed_ids(2, 3), cache=cache)
    with pytest.raises(ValueError, match=f"= {count}: "):
        cache.layers[0].crop(count)
    assert cache.layers[0].get_seq_length() == 3


@torch.no_grad()
def calibrate(model, ids, share):
    """Set each depth threshold to the quantile that lets `share` of the tokens through."""

    def set_threshold(router, arguments):
        scores = torch.sigmoid(router.logits(arguments[0]))
        router.threshold.fill_(scores.flatten().quantile(1 - share))

    hooks = [router.register_forward_pre_hook(set_threshold) for router in depth_routers(model)]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()


def held_bytes(layer):
    """Bytes of all memory that the layer's tensors keep alive."""
    tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor) and value.ndim > 0]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@torch.no_grad()
def fill(model, ids, prompt_length):
    """Prefill, then decode one by one; return the cache and the chosen tokens of every row and depth layer."""
    counts = {router: 0 for router in depth_routers(model)}

    def count(router, arguments, output):
        counts[router] += output[1].chosen_BT.sum(1)

    hooks = [router.register_forward_hook(count) for router in counts]
    cache = DynamicCache(config=model.config)
    model(ids[:, :prompt_length], cache=cache, logits_to_keep=1)
    for position in range(prompt_length, ids.shape[1]):
        model(ids[:, position : position + 1], cache=cache)
    for hook in hooks:
        hook.remove()
    return cache, list(counts.values())


def test_depth_layers_hold_little_more_than_the_stored_tokens_of_their_fullest_row():
    model, ids = make_model(depth_capacity=0.25), mixed_ids(8, 512, 1)
    calibrate(model, ids, 0.25)
    cache, counts = fill(model, ids, 480)
    config = model.config
    bytes_per_token = 2 * config.num_key_value_heads * config.head_dim * torch.float32.itemsize
    for index, count_B in zip(config.depth_layers, counts):
        assert len(set(count_B.tolist())) > 3
        assert abs(count_B.sum().item() / ids.numel() - 0.25) < 0.03
        # of every token also where it stood
        columns = count_B.max().item()
        assert held_bytes(cache.layers[index]) <= columns * len(count_B) * (bytes_per_token + 8)
    with_depth = sum(held_bytes(layer) for layer in cache.layers)
    without_depth, _ = fill(make_model(depth_layers=None), ids, 511)
    assert with_depth <= 0.7 * sum(held_bytes(layer) for layer in without_depth.layers)


def force(router, chosen_BT):
    """Replace the selection of a router; weights stay its own."""

    def replace_selection(module, arguments, output):
        output[1].chosen_BT = chosen_BT

    return router.register_forward_hook(replace_selection)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_step_without_a_row_computes_nothing_in_its_layer(kind):
    model, ids = make_model(), mixed_ids(3, 14, 0)
    layer = model.model.layers[2]
    cache, calls, streams = new_cache(model, kind), [], []
    model(ids[:, :12], cache=cache)
    chosen_BT = torch.cat([cache_chosen(cache.layers[2], 12), torch.zeros(3, 1, dtype=torch.bool)], dim=1)
    hooks = [part.register_forward_hook(lambda *call: calls.append(call)) for part in (layer.self_attn, layer.mlp)]
    hooks += [layer.register_forward_hook(lambda module, arguments, output: streams.append((arguments[0], output)))]
    hooks += [force(layer.depth_router, torch.zeros(3, 1, dtype=torch.bool))]
    model(ids[:, 12:13], cache=cache)
    for hook in hooks:
        hook.remove()
    assert calls == []
    assert torch.equal(*streams[0])
    assert [int(part.get_seq_length()) for part in cache.layers] == [13] * 4
    # the tokens after it are where an uncached forward with the same selection has them
    last_B = torch.tensor([[True], [False], [True]])
    hooks = [force(layer.depth_router, last_B)]
    logits = model(ids[:, 13:], cache=cache).logits[:, -1]
    hooks[0].remove()
    hooks = [force(layer.depth_router, torch.cat([chosen_BT, last_B], dim=1))]
    torch.testing.assert_close(logits, model(ids).logits[:, -1], atol=4e-5, rtol=0)
    hooks[0].remove()


def cache_chosen(layer, length):
    """Which positions a depth layer's cache holds, `[B, T]`."""
    chosen = torch.zeros(len(layer.lengths), length, dtype=torch.bool)
    for row, number in enumerate(layer.lengths):
        chosen[row, layer.slots[row, :number].long()] = True
    return chosen


def test_gradients_flow_back_through_steps():
    model, ids = make_model(), mixed_ids(3, 14, 0)
    layer = model.model.layers[2]
    chosen_BT = torch.rand(3, 14, generator=torch.Generator().manual_seed(0)) < 0.6
    gradients = []
    for places in ([14], [10, 11, 12, 13, 14]):
        model.zero_grad()
        cache, start, total = new_cache(model, "dynamic"), 0, 0.0
        for stop in places:
            hook = force(layer.depth_router, chosen_BT[:, start:stop])
            total = total + model(ids[:, start:stop], cache=cache).logits.square().sum()
            hook.remove()
            start = stop
        total.backward()
        gradients.append({name: parameter.grad for name, parameter in layer.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)
