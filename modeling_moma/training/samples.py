# SPDX-License-Identifier: Apache-2.0
"""What a model in training draws and says every so often, from fixed prompts and held-out images."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging

from tokenization import MomaProcessor

from ..configuration_moma import MomaConfig
from ..data.documents import evenly_spaced
from ..data.kinds import CaptionDocuments
from ..errors_moma import InputError
from ..evaluation.measures import draw_images, write_captions
from ..utils.atomic_files import atomic_write
from .metrics_callback import MomaMetricsCallback
from .recipe import SampleFields


logger = logging.get_logger(__name__)
# characters of a prompt that an error repeats
MOST_SHOWN = 60


def is_split(model: nn.Module) -> bool:
    """Return whether a process holds a part of the weights alone: a forward then takes all processes at once."""
    # the last is what ZeRO 3 of DeepSpeed gives its parameters
    return isinstance(model, FullyShardedDataParallel) or any(
        isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters()
    )


def check_prompts(fields: SampleFields, processor: MomaProcessor, config: MomaConfig) -> None:
    """Raise `ValueError` where a model has no room for an image after a prompt, which would end a training."""
    # scaled rotary embeddings are made to go beyond
    if not fields.every or config.rope_parameters["rope_type"] != "default":
        return
    limit = config.max_position_embeddings
    # with its begin and end
    of_image = processor.image_seq_length + 2
    for number, prompt in enumerate(fields.prompts):
        text = processor.escape_special_tokens(prompt)
        inputs = processor(text=[text], sanitize_control_tokens=True)  # pyright: ignore[reportCallIssue]
        (ids,) = inputs["input_ids"]
        if len(ids) + of_image > limit:
            shown = prompt if len(prompt) <= MOST_SHOWN else f"{prompt[:MOST_SHOWN]}..."
            raise InputError(
                f"RECIPE, samples: prompts[{number}] = {shown!r} has {len(ids)} tokens; with the {of_image} of an "
                f"image they exceed the model's positions, `max_position_embeddings` = {limit}. Shorten the prompt."
            )


class SampleCallback(TrainerCallback):
    """Writes what the model draws and says every so often.

    `samples/step-000400.png` holds a row of drawings of the prompts above a row of held-out images, and
    `samples/step-000400.json` the prompts and the captions of those images. The training's random numbers stay as
    they are. Of a model that processes share among them nothing is drawn, and a warning says so.
    """

    def __init__(
        self,
        fields: SampleFields,
        processor: MomaProcessor,
        held_out: Sequence[CaptionDocuments],
        metrics: MomaMetricsCallback,
    ):
        self.fields, self.processor, self.metrics = fields, processor, metrics
        # neighbours are often alike: rows are sorted by class
        chosen = [(entry, min(fields.images, len(entry))) for entry in held_out]
        pairs = [
            (entry, row) for entry, number in chosen if number for row in evenly_spaced(range(len(entry)), number)
        ]
        self.references = [entry.caption(row) for entry, row in pairs]
        codes = [torch.as_tensor(entry.codes(row).copy()) for entry, row in pairs]
        self.codes = torch.stack(codes) if codes else torch.zeros(0, processor.image_seq_length, dtype=torch.long)

    def on_step_end(self, args, state, control, model: Any = None, **kwargs):
        """Sample where it is time."""
        if state.global_step % self.fields.every or not state.is_world_process_zero:
            return
        if is_split(model):
            logger.warning_once(f"No samples: a {type(model).__name__} is split, and cannot generate on one process.")
            return
        was_training = model.training
        states = random.getstate(), np.random.get_state()
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            try:
                self._write(model.eval(), Path(args.output_dir) / "samples", state.global_step, args.seed)
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
                model.train(was_training)
                self.metrics.discard_evaluation()

    def _write(self, model: Any, folder: Path, step: int, seed: int) -> None:
        rows, said = [], []
        if self.fields.prompts:
            sampling: dict[str, Any] = {"do_sample": False}
            # at 0 the likeliest codes are taken
            if self.fields.temperature > 0:
                sampling = {"do_sample": True, "top_k": 0, "temperature": self.fields.temperature}
            sampling["guidance_scale"] = self.fields.guidance_scale
            drawn = draw_images(model, self.processor, list(self.fields.prompts), 16, sampling, seed)
            rows.append(self._decode(drawn, model.device))
        if len(self.codes):
            captions = write_captions(model, self.processor, self.codes, 16, self.fields.max_new_tokens)
            said = [{"caption": own, "reference": true} for own, true in zip(captions, self.references)]
            rows.append(self._decode(self.codes, model.device))
        name = f"step-{step:06d}"
        if rows:
            atomic_write(folder / f"{name}.png", lambda path: image_grid(rows).save(path, format="PNG"))
        text = json.dumps({"step": step, "prompts": list(self.fields.prompts), "captions": said}, indent=2)
        atomic_write(folder / f"{name}.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))

    def _decode(self, codes: torch.Tensor, device: torch.device) -> list[Image.Image]:
        # there for the time of decoding alone: workers that load data may be given the processor
        before = self.processor.vq_model.device
        try:
            return self.processor.to(device).decode_images(codes)
        finally:
            self.processor.to(before)


def image_grid(rows: Sequence[Sequence[Image.Image]], gap: int = 4) -> Image.Image:
    """Return the rows of equally large images on white."""
    width, height = (side + gap for side in rows[0][0].size)
    grid = Image.new("RGB", (max(map(len, rows)) * width + gap, len(rows) * height + gap), "white")
    for line, row in enumerate(rows):
        for place, image in enumerate(row):
            grid.paste(image, (gap + place * width, gap + line * height))
    return grid
