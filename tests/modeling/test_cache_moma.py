# SPDX-License-Identifier: Apache-2.0

import random

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.depth_moma import (
    DepthSelection,
    MomaDepthCacheLayer,
    MomaDepthRouter,
    MomaStaticDepthCacheLayer,
)
from modeling_moma.modeling_moma import MomaForCausalLM
from modeling_moma.token_groups_moma import ModalitySplit, RoutingContext


HEADS, HEAD_DIM = 2, 4
MAX_LENGTH = 128
VOCABULARY = 60
KINDS = ("dynamic", "static")


def new_layer(kind, max_cache_len=MAX_LENGTH):
    return MomaDepthCacheLayer() if kind == "dynamic" else MomaStaticDepthCacheLayer(max_cache_len)


def pack(chosen_BT):
    chosen_BT = torch.as_tensor(chosen_BT)
    split = ModalitySplit.from_groups(torch.zeros_like(chosen_BT, dtype=torch.long), {"all": chosen_BT.numel()})
    selection = DepthSelection(None, RoutingContext("threshold", split), None, chosen_BT.float())
    selection.chosen_BT = chosen_BT
    selection.pack(keep_empty_rows=False)
    return selection


def step(layer, chosen_BT, generator=None):
    """Feed one step of random keys and values; return what went in for every position, and what came out."""
    chosen_BT = torch.as_tensor(chosen_BT)
    keys, values = torch.randn(2, *chosen_BT.shape, HEADS, HEAD_DIM, generator=generator)
    selection = pack(chosen_BT)
    if not selection.rows:
        nothing = keys.new_empty(chosen_BT.shape[0], 1, 0, 1)
        layer.update(nothing, nothing, selection=selection)
        return keys, values, None, None
    selection.attach(None, layer)
    packed = (selection.lay_out(selection.choose(x).transpose(1, 2)) for x in (keys, values))
    out = layer.update(*packed, selection=selection)
    slot_RS = torch.zeros(len(selection.rows), 0) if selection.slot_RS is None else selection.slot_RS
    return keys, values, slot_RS, out


def contents(layer):
    """`(slot, key, value)` of each row's stored tokens."""
    if not layer.is_initialized:
        return None
    return [
        [(layer.slots[row, i], layer.keys[row, :, i], layer.values[row, :, i]) for i in range(length)]
        for row, length in enumerate(layer.lengths)
    ]


def assert_same_tokens(found, expected):
    assert [int(slot) for slot, _, _ in found] == [int(slot) for slot, _, _ in expected]
    for token, other in zip(found, expected):
        assert torch.equal(token[1], other[1]) and torch.equal(token[2], other[2])


class PlainRows:
    """The reference: a list of tokens for every row."""

    def __init__(self, num_rows):
        self.seen, self.rows = 0, [[] for _ in range(num_rows)]

    def check_returned(self, chosen_BT, keys, values, slot_RS, out):
        """Columns that are not holes are the row's stored tokens in order, then its new ones."""
        taking_part = [row for row in range(len(self.rows)) if chosen_BT[row].any()]
        for index, row in enumerate(taking_part):
            new = [(self.seen + t, keys[row, t], values[row, t]) for t in chosen_BT[row].nonzero()[:, 0].tolist()]
            stored = (slot_RS[index] >= 0).nonzero()[:, 0].tolist()
            columns = stored + [slot_RS.shape[1] + place for place in range(len(new))]
            slots = [*slot_RS[index][stored], *(slot for slot, _, _ in new)]
            found = [(slot, out[0][index, :, i], out[1][index, :, i]) for slot, i in zip(slots, columns)]
            assert_same_tokens(found, self.rows[row] + new)
            assert out[0].shape[2] == slot_RS.shape[1] + int(chosen_BT.sum(1).max())

    def append(self, chosen_BT, keys, values):
        for row, tokens in enumerate(self.rows):
            for t in chosen_BT[row].nonzero()[:, 0].tolist():
                tokens.append((self.seen + t, keys[row, t], values[row, t]))
        self.seen += chosen_BT.shape[1]

    def crop(self, count):
        self.seen -= count
        self.rows = [[token for token in row if token[0] < self.seen] for row in self.rows]

    def select(self, indices):
        self.rows = [list(self.rows[index]) for index in indices]


def random_chosen(rng, num_rows):
    length = rng.choice([1, 1, 2, 5])
    kind = rng.choice(["none", "one row", "all", "mixed", "mixed"])
    chosen = torch.zeros(num_rows, length, dtype=torch.bool)
    if kind == "all":
        chosen[:] = True
    elif kind == "one row":
        chosen[rng.randrange(num_rows), rng.randrange(length)] = True
    elif kind == "mixed":
        chosen = torch.tensor([[rng.random() < 0.4 for _ in range(length)] for _ in range(num_rows)])
    return chosen


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_layer_equals_plain_lists_through_random_calls(kind, seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layer, plain = new_layer(kind), PlainRows(3)
    calls = ["update"] * 6 + ["crop", "crop", "reorder", "repeat", "select", "reset"]
    for _ in range(60):
        call, num_rows = rng.choice(calls), len(plain.rows)
        if call == "update" and plain.seen < MAX_LENGTH - 5:
            chosen = random_chosen(rng, num_rows)
            keys, values, slot_RS, out = step(layer, chosen, generator)
            if out is not None:
                plain.check_returned(chosen, keys, values, slot_RS, out)
            plain.append(chosen, keys, values)
        elif call == "crop":
            count = rng.randint(0, min(6, plain.seen))
            layer.crop(-count)
            plain.crop(count)
        elif call == "reorder":
            indices = [rng.randrange(num_rows) for _ in range(num_rows)]
            layer.reorder_cache(torch.tensor(indices))
            plain.select(indices)
        elif call == "repeat" and num_rows <= 3:
            layer.batch_repeat_interleave(2)
            plain.select([row for row in range(num_rows) for _ in range(2)])
        elif call == "select":
            indices = sorted(rng.sample(range(num_rows), rng.randint(max(1, num_rows - 2), num_rows)))
            layer.batch_select_indices(torch.tensor(indices))
            plain.select(indices)
        elif call == "reset" and rng.random() < 0.4:
            layer.reset()
            plain.crop(plain.seen)
        assert layer.get_seq_length() == plain.seen
        assert layer.get_mask_sizes(2)[1] == 0
        found = contents(layer)
        if found is None:
            assert not any(plain.rows)
            continue
        assert layer.lengths == [len(row) for row in plain.rows]
        for row, expected in zip(found, plain.rows):
            assert_same_tokens(row, expected)


@pytest.mark.parametrize(("count", "message"), [(1, "= 1: crop takes minus"), (-4, "= -4: .* of the 3")])
@pytest.mark.parametrize("kind", KINDS)
def test_crop_by_a_bad_number_raises(kind, count, message):
    layer = new_layer(kind)
    step(layer, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        layer.crop(count)
    assert (layer.get_seq_length(), layer.lengths) == (3, [3, 3])


def make_model(**fields):
    torch.manual_seed(0)
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 21,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "begin_image_token_id": 3,
        "end_image_token_id": 4,
        "image_seq_length": 8,
        "modality_token_ranges": {"image": [[30, VOCABULARY]]},
        "num_experts": {"text": 2, "image": 2},
        "depth_layers": [0, 2],
        "initializer_range": 0.2,
    }
    model = MomaForCausalLM(MomaConfig(**{**defaults, **fields})).eval()
    for router in depth_routers(model):
        router.threshold.uniform_(0.48, 0.54)
    return model


def depth_routers(model):
    return [module for module in model.modules() if isinstance(module, MomaDepthRouter)]


def new_cache(model, kind, max_cache_len=64):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len)


def random_ids(rows, length, seed):
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_offloading_and_prefetching_change_nothing(kind):
    model = make_model()
    cache = new_cache(model, kind)
    model(random_ids(3, 12, 0), cache=cache)
    for layer in (cache.layers[0], cache.layers[2]):
        before = (layer.keys.clone(), layer.values.clone(), layer.slots.clone(), list(layer.lengths))
        layer.offload()
        layer.prefetch()
        assert all(torch.equal(x, y) for x, y in zip(before, (layer.keys, layer.values, layer.slots)))
        assert layer.lengths == before[3] and layer.get_seq_length() == 12


@torch.no_grad()
@pytest.mark.parametrize(("depth_layers", "length"), [(None, 5), ([0, 2], 1), ([0, 2], 5)])
def test_a_static_cache_that_was_reset_is_as_a_fresh_one(depth_layers, length):
    model, ids = make_model(depth_layers=depth_layers), random_ids(2, length, 0)
    caches = [new_cache(model, "static") for _ in range(2)]
    model.generate(random_ids(2, 7, 1), cache=caches[0], max_new_tokens=4)
    caches[0].reset()
    call = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    then, expected = (model.generate(ids, cache=cache, **call) for cache in caches)
    assert torch.equal(then.sequences, expected.sequences)
    torch.testing.assert_close(then.logits, expected.logits, atol=1e-5, rtol=0)


def forget_all(cache):
    cache.reset()


def crop_all(cache):
    cache.crop(-8)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("forget", "hidden", "then_hidden"), [(forget_all, 3, 3), (forget_all, 0, 2), (crop_all, 3, 0), (crop_all, 2, 3)]
)
def test_a_cache_that_was_emptied_knows_nothing_of_what_was_hidden(kind, forget, hidden, then_hidden):
    model, ids = make_model(), random_ids(2, 10, 0)
    for router in depth_routers(model):
        router.threshold.fill_(0.3)
    mask, then_mask = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 10, dtype=torch.long)
    mask[0, :hidden], then_mask[1, :then_hidden] = 0, 0
    used, fresh = new_cache(model, kind), new_cache(model, kind)
    model(ids[:, :8], attention_mask=mask, cache=used)
    forget(used)
    for cache in (used, fresh):
        # what is hidden now was seen before without a mask
        model(ids[:, :8], cache=cache)
    logits, expected = (model(ids[:, 8:9], attention_mask=then_mask[:, :9], cache=c).logits for c in (used, fresh))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    forget(used) if forget is forget_all else used.crop(-9)
    whole = model(ids, attention_mask=then_mask, cache=used).logits[:, -1]
    torch.testing.assert_close(whole, model(ids, attention_mask=then_mask).logits[:, -1], atol=4e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_hides_other_tokens_after_a_crop_is_not_taken_for_the_same(kind):
    model, ids = make_model(), random_ids(2, 7, 0)
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
            model(random_ids(2, 3, 0), cache=cache)


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
    model, ids = make_model(depth_capacity=0.25), random_ids(8, 512, 1)
    calibrate(model, ids, 0.25)
    cache, counts = fill(model, ids, 480)
    config = model.config
    bytes_per_token = 2 * config.num_key_value_heads * config.head_dim * torch.float32.itemsize
    for index, count_B in zip(config.depth_layers, counts):
        assert len(set(count_B.tolist())) > 3
        assert abs(count_B.sum().item() / ids.numel() - 0.25) < 0.01
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
    model, ids = make_model(), random_ids(3, 14, 0)
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
    for row, tokens in enumerate(contents(layer)):
        chosen[row, [int(slot) for slot, _, _ in tokens]] = True
    return chosen


def test_gradients_flow_back_through_steps():
    model, ids = make_model(), random_ids(3, 14, 0)
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
