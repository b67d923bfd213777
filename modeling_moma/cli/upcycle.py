# SPDX-License-Identifier: Apache-2.0
"""Grow a dense or 1t1i model into one with groups of experts."""

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ..utils.fields import Float, Int, Seed
from ..utils.messages import without_import_notices
from .arguments import Flag, parse_fields


if TYPE_CHECKING:
    import torch

    from ..upcycling.report import UpcyclingReceipt

# share of its logits' norm above which a move of text is told
_TEXT_MOVED = 0.05
OfModel = Flag(section="model")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma upcycle`.

    Args:
        model (`str`):
            the seed: a saved model, or a checkpoint of its training.
        to (`str`, *optional*):
            experts of the result, for example 4t4i, 6t2i or 8x; by default text keeps its one network and every other
            modality gets four experts (1t4i), the way for language models.
        output (`str`):
            folder to write; missing or empty.
        preserve_function (`bool`, *optional*, defaults to `False`):
            tokens that an expert takes get what the seed gave them.
        keep_seed (`bool`, *optional*, defaults to `False`):
            the seed's network becomes the shared expert of each group that grows, beside fresh experts that add
            nothing at first: no output changes at the switch.
        expert_intermediate_size (`int`, *optional*):
            with --keep-seed, inner width of a fresh expert; else the seed's.
        perturbation (`float`, *optional*, defaults to `0.0`):
            noise on copies, relative to their spread.
        gumbel_noise (`float`, *optional*):
            scale of the routers' noise in training; by default 1.0, and 0.0 where the seed's training_routing takes
            none.
        gumbel_noise_steps (`int`, *optional*):
            training forwards over which it fades; without, it stays. With gradient accumulation every micro-batch
            counts, not the optimizer's steps.
        seed (`int`, *optional*, defaults to `0`):
            of routers, perturbation and probe.
    """

    model: str
    to: str | None = None
    output: str
    preserve_function: bool = False
    keep_seed: bool = False
    expert_intermediate_size: Annotated[Int | None, OfModel] = None
    perturbation: Float = 0.0
    gumbel_noise: Annotated[Float | None, OfModel] = None
    gumbel_noise_steps: Annotated[Int | None, OfModel] = None
    seed: Seed = 0


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments)


def probe_batch(config, rows: int = 8, length: int = 64) -> "dict[str, torch.Tensor]":
    """Random tokens, rows of each modality in turn: the receipt needs no data."""
    import torch

    modality_ids = [torch.cat([torch.arange(*bounds) for bounds in r]) for r in config.modality_token_ranges.values()]
    is_text = torch.ones(config.vocab_size, dtype=torch.bool)
    for ids in modality_ids:
        is_text[ids] = False
    pools = [is_text.nonzero().flatten(), *modality_ids]
    drawn = [pools[row % len(pools)][torch.randint(len(pools[row % len(pools)]), (length,))] for row in range(rows)]
    return {"input_ids": torch.stack(drawn)}


def text_moved(receipt: "UpcyclingReceipt", modalities: list[str]) -> str | None:
    """Return what to say where the switch moves text, `None` where it hardly does."""
    from ..frames_moma import TEXT

    moved = receipt.output_differences[TEXT]
    if not moved > _TEXT_MOVED:
        return None
    ways = "--keep-seed keeps all of it"
    if modalities != [TEXT]:
        ways = f"without --to text stays as it is, and {ways}"
    return f"moma upcycle: the switch moves text by {moved:.2f} of its logits' norm: {ways}."


def run(args: Arguments) -> None:
    with without_import_notices():
        import torch

        from ..hub.loading import open_model, require_plain_weights
        from ..training.checkpoints import UPCYCLING_FILE, save_next_stage
        from ..upcycling.report import upcycling_receipt
        from ..upcycling.upcycle import parse_experts, upcycle
        from ..utils.atomic_files import check_new_folder

    # what is left of another model there, such as an optimizer, would be taken for this one's
    check_new_folder(args.output)
    torch.manual_seed(args.seed)
    seed = open_model(args.model)
    require_plain_weights("--model", args.model, seed.config)
    upcycled = upcycle(
        seed,
        None if args.to is None else parse_experts(args.to, seed.config.modalities),
        preserve_function=args.preserve_function,
        perturbation=args.perturbation,
        gumbel_noise=args.gumbel_noise,
        gumbel_noise_steps=args.gumbel_noise_steps,
        keep_seed=args.keep_seed,
        expert_intermediate_size=args.expert_intermediate_size,
    )
    length = min(64, seed.config.max_position_embeddings)
    receipt = upcycling_receipt(seed, upcycled, probe_batch(seed.config, length=length))

    save_next_stage(upcycled, args.model, args.output, UPCYCLING_FILE, {"arguments": vars(args), **receipt.to_dict()})
    print(json.dumps(receipt.to_dict(), indent=2))
    hint = text_moved(receipt, seed.config.modalities)
    if hint:
        print(hint, file=sys.stderr)


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
