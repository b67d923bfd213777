# SPDX-License-Identifier: Apache-2.0
"""What several processes do with their batches, and the same in one process."""

import copy

import torch

from helpers.reference import GROUPS
from helpers.tiny import IMAGE_IDS, mixed_ids, tiny_model
from modeling_moma.routing_moma import MomaRouterBase


# scores of none of its models lie within rounding of their threshold
SEED = 1
LEARNING_RATE = 0.01
MODELS = {
    "4t4i": GROUPS["4t4i"],
    "depth": {**GROUPS["4t4i"], "num_hidden_layers": 3, "depth_layers": [0, 2], "depth_capacity": 0.5},
    # one-expert groups, widths that no shard aligns, shared experts, heads with norms of their own
    "uneven": {
        "num_experts": {"text": 6, "image": 4, "speech": 1},
        "expert_intermediate_size": {"text": 20, "image": 12},
        "shared_expert_intermediate_size": {"text": 24},
        "modality_token_ranges": {"image": [list(IMAGE_IDS)], "speech": [[36, 40]]},
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "qk_norm": "layernorm_per_head",
        "untied_attention": True,
        "normalize_gates": True,
        "auxiliary_routers": True,
        "depth_layers": [1],
        "depth_capacity": {"text": 0.5, "image": 0.25, "speech": 0.5},
        "tie_word_embeddings": True,
    },
}
TEXT, IMAGES, MIXED = torch.arange(26, 38).view(2, 6), torch.arange(8, 20).view(2, 6), mixed_ids(2, 6)
# step by step, the batch of each group of processes that share one
ONE_BATCH = [(TEXT,), (MIXED,)]
TWO_BATCHES = [(TEXT, IMAGES), (IMAGES, MIXED)]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, put together from the shards of all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def unwrapped(values: dict) -> dict:
    """The same under the names that they have without activation checkpointing."""
    return {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in values.items()}


def gradients_of(model) -> dict[str, torch.Tensor]:
    return unwrapped({key: whole(value.grad) for key, value in model.named_parameters() if value.grad is not None})


def buffers_of(model) -> dict[str, torch.Tensor]:
    """The state that routers select with."""
    return unwrapped({key: value.clone() for key, value in model.named_buffers() if "router." in key})


def train(model, optimizer, batches: list[torch.Tensor], backward=torch.Tensor.backward, forward=None) -> list[dict]:
    """Train on a batch in each step, through `forward` where a wrapper has one; what the model was after each."""
    steps = []
    for ids in batches:
        optimizer.zero_grad()
        # checkpointed layers would fill a cache twice
        loss = (forward or model)(input_ids=ids, labels=ids, use_cache=False).loss
        backward(loss)
        steps.append({"loss": loss.detach(), "gradients": gradients_of(model), "buffers": buffers_of(model)})
        optimizer.step()
    return steps


def sgd(model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, foreach=False)


@torch.no_grad()
def evaluate(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and greedy continuations, in the model's causal routing."""
    model.eval()
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    return {
        "logits": model(ids).logits,
        "generated": model.generate(ids, **arguments),
        "generated_static": model.generate(ids, cache_implementation="static", **arguments),
    }


def single_process(name: str, batches: list[tuple[torch.Tensor, ...]]) -> dict:
    """Each batch of a step alone, then gradients and routers' statistics in the mean."""
    model = tiny_model(seed=SEED, **MODELS[name])
    optimizer = sgd(model)
    steps = []
    for step in batches:
        copies, losses = [copy.deepcopy(model) for _ in step], []
        for each, ids in zip(copies, step):
            each.zero_grad()
            losses.append(each(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
        for parameter, *others in zip(model.parameters(), *(each.parameters() for each in copies)):
            if parameter.requires_grad:
                parameter.grad = sum(other.grad for other in others) / len(others)
        _merge_routers(model, copies)
        steps.append(
            {
                "losses": [loss.detach() for loss in losses],
                "gradients": gradients_of(model),
                "buffers": buffers_of(model),
            }
        )
        optimizer.step()
    return {"state": model.state_dict(), "steps": steps, "evaluated": [evaluate(model, ids) for ids in batches[-1]]}


def _merge_routers(model, copies):
    """The mean over those that had a token to judge by."""
    everywhere = ([module for module in each.modules() if isinstance(module, MomaRouterBase)] for each in copies)
    for router, *others in zip(
        filter(lambda module: isinstance(module, MomaRouterBase), model.modules()), *everywhere
    ):
        has_seen = torch.stack([(each.num_updates > router.num_updates).expand_as(each.threshold) for each in others])
        mean = (torch.stack([each.threshold for each in others]) * has_seen).sum(0) / has_seen.sum(0).clamp(min=1)
        router.threshold.copy_(torch.where(has_seen.any(0), mean, router.threshold))
        router.num_updates.copy_(torch.stack([each.num_updates for each in others]).amax(0))


def assert_steps_equal(steps: list[dict], expected_steps: list[dict], batch: int):
    """Losses, gradients and routers' state of one process, which had this batch of each step, are the single one's."""
    for step, expected in zip(steps, expected_steps, strict=True):
        torch.testing.assert_close(step["loss"], expected["losses"][batch], atol=1e-5, rtol=1e-5)
        for kind in ("gradients", "buffers"):
            assert step[kind].keys() == expected[kind].keys()
            for key, value in expected[kind].items():
                torch.testing.assert_close(
                    step[kind][key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
                )
