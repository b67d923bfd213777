# SPDX-License-Identifier: Apache-2.0
"""Make a model deeper by copies of its layers that add nothing at first."""

import json
from dataclasses import dataclass

from ..utils.fields import Int
from ..utils.messages import without_import_notices
from .arguments import parse_fields


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma add-layers`.

    Args:
        model (`str`):
            a saved model, or a checkpoint of its training.
        after (`list[int]`):
            layers, counted from 0, behind each of which a copy of it is put.
        output (`str`):
            folder to write; missing or empty.
    """

    model: str
    after: list[Int]
    output: str


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments)


def run(args: Arguments) -> None:
    with without_import_notices():
        from ..hub.loading import open_model, require_plain_weights
        from ..training.checkpoints import LAYERS_FILE, save_next_stage
        from ..upcycling.layers import add_layers
        from ..utils.atomic_files import check_new_folder

    check_new_folder(args.output)
    model = open_model(args.model)
    require_plain_weights("--model", args.model, model.config)
    deeper = add_layers(model, args.after)
    receipt = {
        "layers": {"model": model.config.num_hidden_layers, "deeper": deeper.config.num_hidden_layers},
        "parameters": {"model": model.num_parameters(), "deeper": deeper.num_parameters()},
    }
    save_next_stage(deeper, args.model, args.output, LAYERS_FILE, {"arguments": vars(args), **receipt})
    print(json.dumps(receipt, indent=2))


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
