# SPDX-License-Identifier: Apache-2.0
"""Saving a model of which routers alone have changed."""

import json
from pathlib import Path

from tokenization import MomaProcessor

from .. import MomaForCausalLM, add_auxiliary_routers
from .files import write_folder_aside


def save_with_processor(
    model: MomaForCausalLM, source: str, processor: MomaProcessor, output: str, report_file: str, report: dict
):
    """Save a model that differs from its source in routers only: the weights in the dtype that they came in."""
    stored = MomaForCausalLM.from_pretrained(source, dtype="auto")
    if model.config.auxiliary_routers and not stored.config.auxiliary_routers:
        add_auxiliary_routers(stored)
    # what came as bf16 was widened to fp32 and has not changed since, so nothing is lost
    stored.load_state_dict(model.state_dict())
    for name in ("inference_routing", "depth_inference_routing"):
        setattr(stored.config, name, getattr(model.config, name))

    def write(folder: Path):
        stored.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / report_file).write_text(json.dumps(report, indent=2) + "\n")

    write_folder_aside(output, write)
