# SPDX-License-Identifier: Apache-2.0
"""Memory and time of the loss over a large vocabulary, with all logits at once and with a few positions' at a time.

python -m benchmarks.large_vocabulary
"""

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.speed.clock import seconds
from benchmarks.speed.contenders import moma_config
from benchmarks.speed.profiles import PeakMemory
from benchmarks.speed.shapes import SHAPES, mixed_tokens
from modeling_moma.loss_moma import causal_lm_loss


def loss_and_backward(shape_name: str, tokens: int) -> tuple[dict[bool, Callable[[], None]], list[torch.Tensor]]:
    """What computes the loss and its gradients under bf16 autocast, by whether logits are spared; its tensors."""
    shape = SHAPES[shape_name]
    config = moma_config(shape, "dense", 512)
    head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
    states_BTD = torch.randn(tokens // 512, 512, shape.hidden_size)
    labels_BT = mixed_tokens(shape, tokens // 512, 512)

    def run(is_spared: bool) -> None:
        inputs_BTD = states_BTD.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            first = inputs_BTD if is_spared else head(inputs_BTD)
            loss = causal_lm_loss(config, first, labels_BT, training=True, head=head if is_spared else None).loss
        loss.backward()

    return {spared: lambda spared=spared: run(spared) for spared in (False, True)}, [head.weight, states_BTD]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_vocabulary", description=__doc__)
    parser.add_argument("--shape", default="90m", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(arguments)
    works, known = loss_and_backward(args.shape, args.tokens)
    vocab_size = SHAPES[args.shape].vocab_size
    logits = 4 * args.tokens * vocab_size
    print(f"{args.tokens} positions, a vocabulary of {vocab_size}: fp32 logits {logits / 2**20:.0f} MiB")
    print("\n| | peak MiB | over the fp32 logits | seconds |\n|---|---:|---:|---:|")
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(args.rounds):
        for spared, work in works.items():
            times[spared].append(seconds(work, "cpu"))
    for spared, work in works.items():
        # the gradient of the head is there, and stays
        with PeakMemory([*known, known[0].grad]) as memory:
            work()
        name = "a few positions at a time" if spared else "all at once"
        row = (
            name,
            f"{memory.peak / 2**20:.0f}",
            f"{memory.peak / logits:.2f}",
            f"{statistics.median(times[spared]):.2f}",
        )
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
