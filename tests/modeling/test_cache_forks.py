# SPDX-License-Identifier: Apache-2.0
"""Caches that are stepped, forked, cropped and reordered in any order go on as a forward without a cache does."""

import copy
import pickle
import random
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.depth_moma import MomaDepthRouter


LAYERS = {"full": {}, "depth": {"depth_layers": [0, 2]}}


@pytest.fixture(scope="module", params=LAYERS)
def model(request):
    model = tiny_model(num_hidden_layers=4, max_position_embeddings=512, **LAYERS[request.param]).eval()
    for module in model.modules():
        # some rows take part in a step, and others do not
        if isinstance(module, MomaDepthRouter):
            module.threshold.uniform_(0.45, 0.55)
    return model


def with_layers(cache, layers):
    fork = copy.copy(cache)
    fork.layers = list(layers)
    return fork


def by_names(layer):
    """As who knows a layer's attributes would write it."""
    other = type(layer)()
    for name, value in vars(layer).items():
        setattr(other, name, list(value) if isinstance(value, list) else value)
    return other


FORKS = {
    "copy": lambda cache: with_layers(cache, map(copy.copy, cache.layers)),
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "names": lambda cache: with_layers(cache, map(by_names, cache.layers)),
}


# rows of a static cache are as many as they were
CALLS = {"dynamic": ["repeat", "select", "keep"], "static": []}


@dataclass
class Branch:
    """A cache, and the ids that it has seen."""

    cache: DynamicCache | StaticCache
    ids: torch.Tensor

    def step(self, model, ids, **kwargs):
        """Give the cache new ids; by how much their logits differ from those of a forward without a cache."""
        self.ids = torch.cat([self.ids, ids], dim=1)
        logits = model(ids, cache=self.cache, **kwargs).logits
        expected = model(self.ids, use_cache=False).logits[:, -ids.shape[1] :]
        return float((logits - expected).detach().abs().max())


@torch.no_grad()
@pytest.mark.parametrize("fork", FORKS)
def test_a_step_on_a_cache_and_on_its_fork_and_one_more_equal_those_without_a_cache(fork, model):
    first = Branch(DynamicCache(config=model.config), mixed_ids(length=0))
    for seed, length in enumerate((9, 1)):
        first.step(model, mixed_ids(length=length, seed=seed))
    second = Branch(FORKS[fork](first.cache), first.ids)
    differences = [
        branch.step(model, mixed_ids(length=1, seed=seed))
        for seed, branch in enumerate((first, second, first, second))
    ]
    assert max(differences) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("kind", "seed"), [("dynamic", 0), ("dynamic", 1), ("static", 2)])
def test_forks_and_steps_in_any_order_equal_those_without_a_cache(kind, seed, model):
    rng = random.Random(seed)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=200)
    branches = [Branch(cache, mixed_ids(rows=3, length=0))]
    branches[0].step(model, mixed_ids(rows=3, length=7, seed=seed))
    # views that somebody keeps, and what they were
    kept = []
    for turn in range(40):
        branch = rng.choice(branches)
        rows, length = branch.ids.shape
        call = rng.choice(["step"] * 6 + ["steps"] + ["fork"] * 3 + ["crop", "reorder"] + CALLS[kind])
        if call.startswith("step"):
            ids = mixed_ids(rows, 1 if call == "step" else rng.randint(2, 5), seed=turn)
            assert branch.step(model, ids) < 1e-4, turn
        elif call == "fork" and len(branches) < 6:
            fork = copy.deepcopy if kind == "static" else FORKS[rng.choice(list(FORKS))]
            branches.append(Branch(fork(branch.cache), branch.ids))
        elif call == "crop":
            count = rng.randint(1, min(4, length - 2))
            branch.cache.crop(-count)
            branch.ids = branch.ids[:, :-count]
        elif call == "reorder":
            order = torch.tensor([rng.randrange(rows) for _ in range(rows)])
            branch.cache.reorder_cache(order)
            branch.ids = branch.ids[order]
        elif call == "repeat" and rows < 3:
            branch.cache.batch_repeat_interleave(2)
            branch.ids = branch.ids.repeat_interleave(2, dim=0)
        elif call == "select":
            order = torch.tensor(sorted(rng.sample(range(rows), rng.randint(1, rows))))
            branch.cache.batch_select_indices(order)
            branch.ids = branch.ids[order]
        elif call == "keep":
            layer = branch.cache.layers[1]
            kept += [(view, view.clone()) for view in (layer.keys, layer.values)]
    assert len(branches) > 2
    # a look at every branch, whichever was moved last
    for branch in branches:
        assert branch.step(model, mixed_ids(branch.ids.shape[0], 1, seed=99)) < 1e-4
    assert all(torch.equal(view, before) for view, before in kept)


def test_gradients_of_what_a_fork_has_read_survive_steps_without_gradients(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(mixed_ids(length=7), cache=cache)
        model(mixed_ids(length=1), cache=cache)
    fork = FORKS["copy"](cache)
    model.zero_grad()
    loss = model(mixed_ids(length=1, seed=3), cache=fork).logits.square().mean()
    with torch.no_grad():
        for each in (cache, fork):
            model(mixed_ids(length=1, seed=4), cache=each)
    loss.backward()
    gradient = model.model.layers[1].self_attn.q_proj.weight.grad
    assert gradient.abs().sum() > 0
    # no part of the first cache has entered the graph
    assert not any(layer.keys.requires_grad for layer in cache.layers)


@torch.no_grad()
def test_a_cache_of_inference_mode_goes_on_outside_it(model):
    branch = Branch(DynamicCache(config=model.config), mixed_ids(length=0))
    with torch.inference_mode():
        for length in (7, 1):
            branch.step(model, mixed_ids(length=length))
    for seed in range(3):
        assert branch.step(model, mixed_ids(length=1, seed=seed)) < 1e-4
