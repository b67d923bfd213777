# SPDX-License-Identifier: Apache-2.0
"""Which layout trains a MoMa fastest on a number of GPUs: memory, computation and traffic against the hardware."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..configuration_moma import MomaConfig
from ..errors_moma import InputError
from .costs import flops_per_token
from .layouts import Collective, Layout, Memory, training_memory, training_traffic


GIGA = 1e9


@dataclass(frozen=True)
class Hardware:
    """Nominal figures of a cluster; the defaults are those of NVIDIA H100 SXM nodes with one 400 Gb/s adapter per GPU.

    Attributes:
        memory (`float`):
            bytes of one GPU.
        headroom (`float`):
            share of the memory that a plan may use; the CUDA context, communication buffers and fragmentation take the
            rest.
        flops (`float`):
            bf16 FLOPs per second of one GPU, dense.
        utilization (`float`):
            share of `flops` that a training reaches while it computes.
        bandwidth (`float`):
            bytes per second that a GPU sends within its node.
        network (`float`):
            bytes per second that a GPU sends to other nodes.
        latency (`float`):
            seconds from one GPU to the next.
        node_size (`int`):
            GPUs of one node.
    """

    memory: float = 80 * GIGA
    headroom: float = 0.9
    flops: float = 989e12
    utilization: float = 0.4
    bandwidth: float = 450 * GIGA
    network: float = 50 * GIGA
    latency: float = 5e-6
    node_size: int = 8

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"`{name}` must be positive and finite, got {value}.")
        for name in ("headroom", "utilization"):
            if getattr(self, name) > 1:
                raise InputError(f"`{name}` is a share, at most 1, got {getattr(self, name)}.")

    def seconds(self, collective: Collective) -> float:
        """Time of an exchange in one step.

        Rings between nodes use the adapters of all the group's GPUs in a node; of an all-to-all each GPU sends what
        leaves the node through its own. Groups follow one another over all nodes, so that those whose size does not
        divide a node lie partly in two: the slowest counts.
        """
        waiting = collective.calls * collective.hops * self.latency
        span = collective.ranks * collective.stride
        if self.node_size % span == 0:
            return waiting + collective.sent / self.bandwidth
        # the fewest GPUs of a group that share a node
        inside = max(1, math.gcd(span, self.node_size) // collective.stride)
        if collective.kind == "all_to_all":
            leaving = collective.payload * (collective.ranks - inside) / collective.ranks
            return waiting + leaving / self.network
        return waiting + collective.sent / min(self.bandwidth, inside * self.network)


@dataclass(frozen=True)
class Plan:
    """One way to train, and what a step of it takes.

    Attributes:
        layout ([`Layout`]):
            who holds what.
        checkpointing (`bool`):
            whether layers are computed again in the backward pass.
        sequences (`int`):
            sequences of one forward on a data-parallel rank.
        micro_batches (`int`):
            forwards of a step.
        memory ([`Memory`]):
            of one GPU.
        compute_seconds (`float`):
            matmuls of one step.
        weight_seconds (`float`):
            traffic of weights and gradients, beside the computation.
        token_seconds (`float`):
            traffic of tokens, for which the computation waits.
        collectives (`list[Collective]`):
            the traffic.
    """

    layout: Layout
    checkpointing: bool
    sequences: int
    micro_batches: int
    memory: Memory
    compute_seconds: float
    weight_seconds: float
    token_seconds: float
    collectives: list[Collective]

    @property
    def seconds(self) -> float:
        """Estimate of a step: traffic of weights hides behind the computation, or the other way round."""
        return max(self.compute_seconds, self.weight_seconds) + self.token_seconds


def candidate_layouts(config: MomaConfig, gpus: int, node_size: int) -> list[Layout]:
    """Return layouts worth a look: DDP, FSDP over all GPUs, HSDP with a shard group in each node, each with TP and EP.

    For EP there is HSDP with shard groups as small as EP needs, too.
    """
    result = []
    counts = [config.group_num_experts(group) for group in config.expert_groups]
    fewest = min((count for count in counts if count > 1), default=1)
    for tensor in _divisors(math.gcd(gpus, node_size)):
        ranks = gpus // tensor
        usual = {1, math.gcd(ranks, node_size // tensor), ranks}
        # expert parallelism needs an expert of each group for every rank
        few = math.gcd(ranks, max(1, fewest // tensor))
        for shard in sorted(usual | {few}):
            for expert in _divisors(shard):
                if expert == 1 and shard not in usual:
                    continue
                layout = Layout(ranks // shard, shard, tensor, expert)
                try:
                    layout.check(config)
                except ValueError:
                    continue
                result.append(layout)
    return result


def plan_training(
    config: MomaConfig,
    gpus: int,
    tokens_per_gpu: int,
    sequence_length: int,
    hardware: Hardware | None = None,
) -> tuple[list[Plan], list[tuple[Layout, Memory]]]:
    """Plan the training of a model with every layout; see [`candidate_layouts`].

    For each layout the fastest of the micro-batches that fit is taken, with and without checkpointing.

    Args:
        config (`MomaConfig`):
            the model.
        gpus (`int`):
            number of GPUs.
        tokens_per_gpu (`int`):
            tokens of one optimiser step, divided by `gpus`. Modalities equally frequent.
        sequence_length (`int`):
            tokens of one sequence.
        hardware ([`Hardware`], *optional*):
            by default H100 nodes.

    Returns:
        `tuple[list[Plan], list[tuple[Layout, Memory]]]`: plans that fit, fastest first, and the layouts that do not,
        with the least memory that they need.

    Raises:
        ValueError: a number is below 1, GPUs fill no whole nodes, sequences are longer than the model's positions, or
            a step has no whole number of sequences on each GPU.
    """
    hardware = hardware or Hardware()
    for name, value in (("gpus", gpus), ("tokens_per_gpu", tokens_per_gpu), ("sequence_length", sequence_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"`{name}` must be a positive integer, got {value!r}.")
    if gpus > hardware.node_size and gpus % hardware.node_size:
        raise InputError(f"`gpus` = {gpus} fill no whole number of nodes of {hardware.node_size}.")
    if sequence_length > config.max_position_embeddings:
        raise InputError(
            f"`sequence_length` = {sequence_length} exceeds the model's positions ({config.max_position_embeddings})."
        )
    if tokens_per_gpu % sequence_length:
        raise InputError(
            f"`tokens_per_gpu` = {tokens_per_gpu} is no multiple of `sequence_length` ({sequence_length}): a step "
            "would end within a sequence."
        )
    # fewer GPUs than a node has are one, whatever their number
    hardware = replace(hardware, node_size=min(hardware.node_size, gpus))
    plans, misfits = [], []
    for layout in candidate_layouts(config, gpus, hardware.node_size):
        fitting, least = [], None
        for plan in _plans_of(config, layout, tokens_per_gpu, sequence_length, hardware):
            if least is None or plan.memory.total < least.total:
                least = plan.memory
            if plan.memory.total <= hardware.headroom * hardware.memory:
                fitting.append(plan)
        if fitting:
            plans.append(min(fitting, key=_speed))
        else:
            misfits.append((layout, least))
    plans.sort(key=_speed)
    misfits.sort(key=lambda misfit: misfit[1].total)
    return plans, misfits


def _speed(plan: Plan) -> tuple[float, float, float]:
    # among plans that compute as fast, prefer the one whose traffic is easiest to hide
    return plan.seconds, plan.weight_seconds, plan.memory.total


def _plans_of(
    config: MomaConfig, layout: Layout, tokens_per_gpu: int, sequence_length: int, hardware: Hardware
) -> Iterator[Plan]:
    # a tensor-parallel group works on the tokens of all its GPUs
    tokens = tokens_per_gpu * layout.tensor
    modalities = config.modalities
    flops = sum(flops_per_token(config, modality, sequence_length, training=True) for modality in modalities)
    # matmuls are split over the tensor-parallel group again
    seconds = tokens_per_gpu * flops / len(modalities) / (hardware.flops * hardware.utilization)
    num_sequences = tokens // sequence_length
    for checkpointing in (False, True):
        for sequences in _divisors(num_sequences):
            micro_batches = num_sequences // sequences
            collectives = training_traffic(config, layout, tokens, micro_batches, checkpointing)
            overlapped = sum(hardware.seconds(item) for item in collectives if item.is_overlapped)
            waited = sum(hardware.seconds(item) for item in collectives if not item.is_overlapped)
            yield Plan(
                layout,
                checkpointing,
                sequences,
                micro_batches,
                training_memory(config, layout, sequences * sequence_length, checkpointing),
                # checkpointing adds one forward to the cost of three
                seconds * (4 / 3 if checkpointing else 1),
                overlapped,
                waited,
                collectives,
            )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
