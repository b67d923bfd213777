# SPDX-License-Identifier: Apache-2.0
"""What the study trains: recipes of equal training FLOPs a token, sizes, seeds and budgets of tokens."""

from dataclasses import dataclass
from typing import Any

from modeling_moma.errors_moma import InputError


@dataclass(frozen=True)
class Pace:
    """How runs count and when they change.

    Args:
        rows (`int`, *optional*, defaults to `16`):
            of a step.
        row_tokens (`int`, *optional*, defaults to `512`):
            positions of a row.
        longest (`int`, *optional*, defaults to `100`):
            millions of tokens for which the stream is made that all runs read.
        warmup_steps (`int`, *optional*, defaults to `100`):
            in which the learning rate rises.
        curve_steps (`int`, *optional*, defaults to `122`):
            of a million tokens, 999,424 to be exact, and between two points of a curve: budgets end with one.
        decay (`float`, *optional*, defaults to `0.2`):
            of a budget's steps, those in which the learning rate falls to 0.
    """

    rows: int = 16
    row_tokens: int = 512
    longest: int = 100
    warmup_steps: int = 100
    curve_steps: int = 122
    decay: float = 0.2

    @property
    def step_tokens(self) -> int:
        """Positions of a step."""
        return self.rows * self.row_tokens

    def steps(self, millions: int) -> int:
        """Return the steps of a budget in millions of tokens."""
        return millions * self.curve_steps

    def branch_step(self, millions: int) -> int:
        """Return the step of a budget at which its decay leaves the trunk."""
        return round((1 - self.decay) * self.steps(millions))


@dataclass(frozen=True)
class Size:
    """A size of the model.

    Args:
        hidden_size (`int`):
            width `D`.
        layers (`int`):
            their number.
        learning_rate (`float`):
            largest one of the dense model.
    """

    hidden_size: int
    layers: int
    learning_rate: float


# by their active parameters without embeddings, in millions
SIZES = {
    "0.5M": Size(128, 3, 4e-3),
    "1M": Size(160, 4, 3e-3),
    "2.5M": Size(256, 4, 2e-3),
}

TWO = ("text", "image")
# inner width of the dense model's feed-forward network over the hidden size
FEED_FORWARD = 2


def _groups(text: int, image: int) -> dict[str, int]:
    return {"text": text, "image": image}


def recipe_fields(recipe: str, size: Size) -> dict[str, Any]:
    """Return the fields of `MomaConfig` that make a recipe of the dense model.

    Args:
        recipe (`str`):
            one of [`RECIPES`].
        size ([`Size`]):
            of the dense model.

    Raises:
        ValueError: there is no such recipe.
    """
    if recipe not in RECIPES:
        raise InputError(f"recipe {recipe!r}: it must be one of {list(RECIPES)}.")
    fields = {name: value for name, value in RECIPES[recipe].items() if name != "upcycled"}
    width = FEED_FORWARD * size.hidden_size
    # each modality pays for its own skipping, so that its tokens cost what dense's cost
    widths = dict.fromkeys(TWO, width)
    if depth := fields.pop("depth", None):
        capacities = depth if isinstance(depth, dict) else dict.fromkeys(TWO, depth)
        fields |= {"depth_layers": [1], "depth_capacity": capacities}
        widths = {modality: width * widening(size.layers, capacities[modality]) for modality in TWO}
    routed = fields.pop("routed", 1.0)
    fields["intermediate_size"] = round(routed * widths["image"])
    if widths["text"] != widths["image"]:
        fields["expert_intermediate_size"] = {"text": round(routed * widths["text"])}
    if shared := fields.pop("shared", None):
        inner = {modality: round(shared * widths[modality]) for modality in TWO}
        is_pool = isinstance(fields["num_experts"], int)
        fields["shared_expert_intermediate_size"] = inner["image"] if is_pool else inner
    return fields


@dataclass(frozen=True)
class Seed:
    """What an upcycled model grows from.

    Args:
        recipe (`str`):
            see [`RECIPES`].
        millions (`int`):
            tokens of its training. They count as the upcycled model's, and cost what its own tokens cost.
        experts (`str`):
            of the upcycled model, as `moma upcycle --to` takes them.
    """

    recipe: str
    millions: int
    experts: str


def seed_of(recipe: str) -> Seed | None:
    """Return what a recipe's model grows from, `None` for one that begins with random weights."""
    return RECIPES[recipe].get("upcycled")


def widening(layers: int, capacity: float) -> float:
    """Return how much wider feed-forward networks are where a depth layer of this capacity takes one layer's place.

    In units of the squared width a layer's attention has 4 and its feed-forward network 6 parameters.
    """
    run = layers - 1 + capacity
    return (10 * layers / run - 4) / 6


# in training as at inference
TOKEN_CHOICE = {"training_routing": "token_choice", "inference_routing": "token_choice"}

# `routed` and `shared` are widths of an expert over that of the dense network, `depth` is the second layer's capacity,
# for all tokens or for each modality's, `upcycled` is the seed that a model grows from
RECIPES: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": 1},
    # as many parameters as 4t4i with a shared expert has in all: three times dense's FLOPs a token without the head
    "dense-wide": {"num_experts": 1, "routed": 5.0},
    "1t1i": {"num_experts": _groups(1, 1)},
    "8x": {"num_experts": 8},
    "4t4i": {"num_experts": _groups(4, 4)},
    "6t2i": {"num_experts": _groups(6, 2)},
    "8x-shared": {"num_experts": 8, "routed": 0.5, "shared": 0.5},
    "4t4i-shared": {"num_experts": _groups(4, 4), "routed": 0.5, "shared": 0.5},
    "6t2i-shared": {"num_experts": _groups(6, 2), "routed": 0.5, "shared": 0.5},
    # capacity 1.25 and 2 at equal FLOPs: the share that a token meets stays
    "4t4i-c1.25": {"num_experts": _groups(4, 4), "expert_capacity_factor": 1.25, "routed": 0.8},
    "4t4i-c2": {"num_experts": _groups(4, 4), "expert_capacity_factor": 2.0, "routed": 0.5},
    "8t8i-c2": {"num_experts": _groups(8, 8), "expert_capacity_factor": 2.0, "routed": 0.5},
    "8t8i-c2-shared": {
        "num_experts": _groups(8, 8),
        "expert_capacity_factor": 2.0,
        "routed": 0.25,
        "shared": 0.5,
    },
    "4t4i-token-choice": {"num_experts": _groups(4, 4), **TOKEN_CHOICE},
    "4t4i-token-choice-shared": {
        "num_experts": _groups(4, 4),
        **TOKEN_CHOICE,
        "routed": 0.5,
        "shared": 0.5,
    },
    "4t4i-threshold": {"num_experts": _groups(4, 4), "training_routing": "threshold"},
    "8x-token-choice": {"num_experts": 8, **TOKEN_CHOICE},
    "8x-token-choice-biases": {
        "num_experts": 8,
        **TOKEN_CHOICE,
        "balance_bias_by_modality": True,
    },
    "untied-1t1i": {"num_experts": _groups(1, 1), "untied_attention": True},
    "untied-4t4i-shared": {"num_experts": _groups(4, 4), "untied_attention": True, "routed": 0.5, "shared": 0.5},
    "1t1i-shared": {"num_experts": _groups(1, 1), "routed": 0.5, "shared": 0.5},
    "1t1i-token-choice-shared": {"num_experts": _groups(1, 1), **TOKEN_CHOICE, "routed": 0.5, "shared": 0.5},
    "4t4i-upcycled": {"num_experts": _groups(4, 4), "upcycled": Seed("1t1i", 4, "4t4i")},
    "4t4i-shared-upcycled": {
        "num_experts": _groups(4, 4),
        "routed": 0.5,
        "shared": 0.5,
        "upcycled": Seed("1t1i-shared", 4, "4t4i"),
    },
    "4t4i-token-choice-shared-upcycled": {
        "num_experts": _groups(4, 4),
        **TOKEN_CHOICE,
        "routed": 0.5,
        "shared": 0.5,
        "upcycled": Seed("1t1i-token-choice-shared", 4, "4t4i"),
    },
    "4t4i-threshold-shared-upcycled": {
        "num_experts": _groups(4, 4),
        "training_routing": "threshold",
        "routed": 0.5,
        "shared": 0.5,
        "upcycled": Seed("1t1i-shared", 4, "4t4i"),
    },
    "4t4i-shared-depth": {"num_experts": _groups(4, 4), "routed": 0.5, "shared": 0.5, "depth": 0.5},
    # half of the text skips the layer, as above, and no image does
    "4t4i-shared-depth-text": {
        "num_experts": _groups(4, 4),
        "routed": 0.5,
        "shared": 0.5,
        "depth": {"text": 0.5, "image": 1.0},
    },
}


@dataclass(frozen=True)
class Run:
    """A trunk of one learning rate, and the decays that branch off it.

    Args:
        recipe (`str`):
            see [`RECIPES`].
        size (`str`):
            see [`SIZES`].
        seed (`int`):
            of weights and of the order of the data, which is one for all recipes.
        budgets (`tuple[int, ...]`):
            millions of tokens at which a decay ends.
        rate (`float`, *optional*, defaults to `1.0`):
            the learning rate over that of the size.
        data (`str`, *optional*, defaults to `"all"`):
            `"twelfth"`: a twelfth of the icons, read twelve times as often. `"shipped"`: all of the data, through the
            processor of `model_cards/moma-icons`, which every machine has: its losses are not those of the study's
            own, whose codes and words are others. `"shipped-twelfth"`: a twelfth of the icons through that one.
    """

    recipe: str
    size: str
    seed: int
    budgets: tuple[int, ...]
    rate: float = 1.0
    data: str = "all"

    @property
    def name(self) -> str:
        """The run's folder."""
        rate = "" if self.rate == 1 else f"-rate{self.rate:g}"
        data = "" if self.data == "all" else f"-{self.data}"
        return f"{self.size}-{self.recipe}{rate}{data}-seed{self.seed}"

    @property
    def learning_rate(self) -> float:
        """Largest learning rate."""
        return self.rate * SIZES[self.size].learning_rate


def model_fields(run: Run) -> dict[str, Any]:
    """Return a run's section `model`, over that of `recipes/study.yaml`."""
    size = SIZES[run.size]
    fields = {"hidden_size": size.hidden_size, "num_hidden_layers": size.layers}
    return fields | recipe_fields(run.recipe, size)


# recipes of which one seed goes on to more tokens
LONGER = ("dense", "1t1i", "4t4i-shared", "4t4i")
COMPARED = (*LONGER, "8x", "6t2i", "8x-shared", "4t4i-token-choice")
# what may make the best of them better
TRIED = ("4t4i-token-choice-shared-upcycled", "4t4i-shared-upcycled", "4t4i-upcycled")
# what the study claims, on seeds that chose nothing, and the two of which another such seed goes on to the most tokens
CLAIMED = ("dense", "1t1i", "4t4i-shared-upcycled")
FRESH_SEEDS = (3, 4, 5)
LONGEST = ("dense", "4t4i-shared-upcycled")
# two more seeds that chose nothing, to the most tokens, on codes that every machine has
SHIPPED_SEEDS = (6, 7)
# of more FLOPs a token than dense
COSTLIER = ("dense-wide",)
# larger sizes, of the two alone
LARGER = ("1M", "2.5M")
# one thing changed at a time, and the recipe that it is changed in
LEVERS = {
    "untied-4t4i-shared": "4t4i-shared",
    "8t8i-c2-shared": "4t4i-shared",
    "4t4i-shared-depth": "4t4i-shared",
    "4t4i-shared-depth-text": "4t4i-shared",
    "4t4i-token-choice-shared": "4t4i-shared",
    "4t4i-c2": "4t4i",
    "4t4i-c1.25": "4t4i",
    "4t4i-threshold": "4t4i",
    "8x-token-choice-biases": "8x-token-choice",
    "8x-token-choice": "4t4i",
    "untied-1t1i": "1t1i",
}
# recipes that levers are measured against, dense first
CONTROLS = tuple(dict.fromkeys(("dense", *(control for control in LEVERS.values() if control not in LEVERS))))


def _first_seed(recipe: str) -> Run:
    return Run(recipe, "0.5M", 1, (10, 20, 40) if recipe in LONGER else (10, 20))


def _shipped(recipe: str, seed: int, budgets: tuple[int, ...], rate: float = 1.0) -> Run:
    return Run(recipe, "0.5M", seed, budgets, rate, data="shipped")


def _second_seed(recipe: str) -> Run:
    return Run(recipe, "0.5M", 2, (10, 20, 40, 100) if recipe in LONGEST else (10, 20))


# in the order in which they are trained: what decides on the learning rate, what the study claims, what it compares,
# whether another rate suits many tokens better, the slope over sizes, what repeated data does, and levers
PLAN: tuple[Run, ...] = (
    *(Run(recipe, "0.5M", 0, (5,), rate) for rate in (0.5, 1.0, 2.0) for recipe in ("dense", "4t4i-shared")),
    *(Run(recipe, "0.5M", seed, (10, 20)) for seed in FRESH_SEEDS for recipe in CLAIMED),
    *(_first_seed(recipe) for recipe in (*TRIED, *COMPARED)),
    *(_second_seed(recipe) for recipe in LONGEST),
    *(Run(recipe, "0.5M", 2, (40,), rate=0.5) for recipe in LONGEST),
    *(_second_seed(recipe) for recipe in COMPARED if recipe not in LONGEST),
    *(Run(recipe, size, 1, (10, 20)) for size in LARGER for recipe in LONGEST),
    *(Run(recipe, "0.5M", 1, (10, 20), data="twelfth") for recipe in LONGEST),
    *(Run(recipe, "0.5M", 1, (10, 20), data="shipped") for recipe in (*CONTROLS, *LEVERS)),
    *(Run(recipe, "0.5M", 1, (10, 20), data="shipped-twelfth") for recipe in ("dense", "4t4i-shared")),
    *(_shipped(recipe, seed, (10, 20, 40, 100)) for seed in SHIPPED_SEEDS for recipe in CLAIMED),
    _shipped("dense", 6, (40, 100), rate=0.5),
    _shipped("dense-wide", 6, (20, 40)),
    _shipped("4t4i-shared-upcycled", 6, (40, 100), rate=0.5),
    _shipped("dense-wide", 7, (20, 40)),
    *(_shipped(f"4t4i-{routing}-shared-upcycled", 6, (40,)) for routing in ("threshold", "token-choice")),
)
# selections with a twelfth of the icons, and those that have all
TWELFTHS = {"twelfth": "all", "shipped-twelfth": "shipped"}
