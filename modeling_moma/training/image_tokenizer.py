# SPDX-License-Identifier: Apache-2.0
"""Training of the picture tokenizer on a data set with a column `image`."""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from tokenization import MomaImageProcessor
from tokenization.augmentation_moma import augment_pictures
from tokenization.configuration_moma_vq import PRESETS, MomaVQConfig
from tokenization.modeling_moma_vq import MomaVQModel
from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork

from .files import write_folder_aside
from .precision import supports_bf16


DEFAULT_PRESET = "small"


STATE_FILE = "training_state.pt"


METRICS_FILE = "metrics.json"


# arguments without which a run would end elsewhere; the model's own are in its configuration
DECISIVE = ("steps", "batch_size", "learning_rate", "warmup_steps", "seed")


# pictures whose latents give the codebook at the start, and steps between two such starts during warm-up
CODEBOOK_PICTURES = 256


CODEBOOK_INTERVAL = 20


EVALUATION_BATCH = 128


def read_config(args: argparse.Namespace) -> MomaVQConfig:
    weights = asked_weights(args)
    name = args.config or DEFAULT_PRESET
    if name in PRESETS:
        return MomaVQConfig.from_preset(name, **weights)
    if not Path(name).is_file():
        raise ValueError(f"--config {name!r} is neither one of {sorted(PRESETS)} nor a file.")
    return MomaVQConfig(**{**json.loads(Path(name).read_text()), **weights})


def asked_weights(args: argparse.Namespace) -> dict[str, float]:
    """Weights of the loss that the command line gives."""
    weights = {"semantic_weight": args.semantic_weight, "perceptual_weight": args.perceptual_weight}
    return {name: value for name, value in weights.items() if value is not None}


def check_resumed(args: argparse.Namespace, config: MomaVQConfig, begun: dict):
    """Compare the command line with what a checkpoint was begun with; what it leaves out is the checkpoint's.

    Args:
        args: of the run that goes on.
        config: of the checkpoint.
        begun: the arguments that its run was begun with.

    Raises:
        ValueError: they differ, so the run would not end as it would have.
    """
    asked = asked_weights(args)
    if args.config:
        now = read_config(args)
        asked |= {name: getattr(now, name) for name in MomaVQConfig.__annotations__}
    pairs: dict[str, tuple[Any, Any]] = {name: (getattr(config, name), value) for name, value in asked.items()}
    pairs |= {f"--{name.replace('_', '-')}": (value, getattr(args, name)) for name, value in begun.items()}
    for name, (then, now) in pairs.items():
        # JSON knows no tuples
        is_same = list(then) == list(now) if isinstance(then, (list, tuple)) and now is not None else then == now
        if not is_same:
            raise ValueError(
                f"--resume: the run in `--output` {args.output!r} was begun with {name} = {then!r}, and this command "
                f"asks for {now!r}. Resume with the arguments of the first start, or give a new `--output`."
            )


def load_pictures(dataset: Dataset, side: int) -> torch.Tensor:
    """All pictures of a split, as the processor will show them to the model, in one uint8 tensor `(pictures, 3, side,
    side)`."""
    image_processor = MomaImageProcessor.for_resolution(side, do_rescale=False, do_normalize=False)
    pictures = torch.empty(len(dataset), 3, side, side, dtype=torch.uint8)
    for index, picture in enumerate(tqdm(dataset["image"], desc="loading pictures", total=len(dataset))):
        pictures[index] = image_processor(picture, return_tensors="pt")["pixel_values"][0]
    return pictures


def to_pixel_values(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    pixel_values = pictures.to(device).float() / 127.5 - 1
    return pixel_values.to(memory_format=torch.channels_last)


def batch_indices(step: int, batch_size: int, num_pictures: int, seed: int) -> torch.Tensor:
    """The pictures of one step: a fresh order for each epoch, known from the step alone, so that runs can resume."""
    epoch, position = divmod(step, max(num_pictures // batch_size, 1))
    order = torch.randperm(num_pictures, generator=torch.Generator().manual_seed(seed + 7919 * epoch))
    return order[position * batch_size : (position + 1) * batch_size]


def semantic_targets(
    teacher: MomaVQPerceptualNetwork, pictures: torch.Tensor, device: torch.device, bf16: bool
) -> torch.Tensor:
    """The teacher's features `(pictures, feature_dim)` of pictures without augmentation."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        features = [
            teacher.features(to_pixel_values(batch, device))
            for batch in tqdm(pictures.split(EVALUATION_BATCH), desc="teacher features")
        ]
    return torch.cat(features)


@torch.no_grad()
def evaluate(model: MomaVQModel, pictures: torch.Tensor, targets: torch.Tensor | None) -> dict[str, float]:
    """Mean PSNR in dB, perplexity of the codes, share of codes in use, mean cosine to the teacher, in float32."""
    model.eval()
    psnr, tokens, cosines = [], [], []
    for start in range(0, len(pictures), EVALUATION_BATCH):
        pixel_values = to_pixel_values(pictures[start : start + EVALUATION_BATCH], model.device)
        output = model(pixel_values)
        # the range of [-1, 1] is 2 wide
        errors = (output.reconstruction.clamp(-1, 1) - pixel_values).pow(2).mean(dim=(1, 2, 3)).clamp(min=1e-10)
        psnr.append(10 * torch.log10(4 / errors))
        tokens.append(output.image_tokens)
        if targets is not None:
            wanted = targets[start : start + EVALUATION_BATCH]
            cosines.append(F.cosine_similarity(output.semantic_prediction, wanted))
    model.train()
    tokens = torch.cat(tokens)
    result = {
        "psnr": torch.cat(psnr).mean().item(),
        "perplexity": model.codebook_perplexity(tokens).item(),
        "codes_used": tokens.unique().numel(),
    }
    if targets is not None:
        result["semantic_cosine"] = torch.cat(cosines).mean().item()
    return result


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path for path in output.glob("checkpoint-*") if path.suffix != ".aside")


def save_checkpoint(output: Path, step: int, model: MomaVQModel, state: dict, metrics: list[dict]) -> None:
    """Write aside, rename, and only then remove the older checkpoints: a kill at any moment leaves a complete one."""
    older = checkpoints(output)
    final = output / f"checkpoint-{step:07d}"
    aside = final.with_suffix(".aside")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    torch.save({"step": step, "metrics": metrics, **state}, aside / STATE_FILE)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    for path in older:
        if path != final:
            shutil.rmtree(path)


def save_model(output: Path, model: MomaVQModel, metrics: list[dict]) -> None:
    """The finished model and its metrics."""

    def save(folder: Path):
        model.save_pretrained(folder)
        (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n")

    write_folder_aside(output, save)


class TokenizerTraining:
    """The model, its data and its optimizer; `run` trains to the last step."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.output = Path(args.output)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = supports_bf16(self.device) if args.bf16 == "auto" else args.bf16 == "on"
        splits = load_dataset(args.data)
        for name in ("train", "validation"):
            if name not in splits or "image" not in splits[name].column_names:
                raise ValueError(
                    f"--data {args.data!r} needs a split {name!r} with a column 'image'; it has {splits}."
                )

        self.step, self.metrics, state = 0, [], None
        if args.resume and checkpoints(self.output):
            folder = checkpoints(self.output)[-1]
            self.model = MomaVQModel.from_pretrained(folder)
            state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
            check_resumed(args, self.model.config, state.get("arguments", {}))
            self.step, self.metrics = state["step"], state["metrics"]
            print(f"resuming from step {self.step}")
        else:
            torch.manual_seed(args.seed)
            self.model = MomaVQModel(read_config(args))
        self.model = self.model.to(self.device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=args.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=1e-4,
            fused=True,
        )
        self.scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            self.optimizer, args.warmup_steps, args.steps, min_lr_rate=0.02
        )
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])

        side = self.model.config.resolution
        self.pictures, self.held_out = (load_pictures(splits[name], side) for name in ("train", "validation"))
        self.prepare_teacher()

    def prepare_teacher(self) -> None:
        config = self.model.config
        self.targets, self.held_out_targets, self.perceptual = None, None, None
        wants_semantics = config.semantic_dim is not None and config.semantic_weight > 0
        fresh_trunk = self.model.encoder.trunk if self.step == 0 else None
        if not wants_semantics and fresh_trunk is None and config.perceptual_weight == 0:
            return
        teacher = MomaVQPerceptualNetwork().to(  # pyright: ignore[reportCallIssue]
            self.device, memory_format=torch.channels_last
        )
        if fresh_trunk is not None:
            fresh_trunk.load_imagenet_weights(teacher.network)
        if wants_semantics:
            if config.semantic_dim != teacher.feature_dim:
                raise ValueError(f"semantic_dim={config.semantic_dim}, but the teacher gives {teacher.feature_dim}.")
            features = semantic_targets(teacher, self.pictures, self.device, self.bf16)
            mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-3)
            self.targets = (features - mean) / std
            held_out_features = semantic_targets(teacher, self.held_out, self.device, self.bf16)
            self.held_out_targets = (held_out_features - mean) / std
        if config.perceptual_weight > 0:
            self.perceptual = teacher.distance

    def train_step(self) -> dict[str, float]:
        # everything random follows from the step, so a resumed run repeats what the killed one would have done
        torch.manual_seed(self.args.seed * 1_000_003 + self.step)
        chosen = batch_indices(self.step, self.args.batch_size, len(self.pictures), self.args.seed)
        pixel_values = augment_pictures(to_pixel_values(self.pictures[chosen], self.device))
        # while the learning rate rises, the latents move faster than the averages follow
        if self.step == 0 or (self.step < self.args.warmup_steps and self.step % CODEBOOK_INTERVAL == 0):
            first = self.pictures[torch.randperm(len(self.pictures))[:CODEBOOK_PICTURES]]
            self.model.initialize_codebook(to_pixel_values(first, self.device))
        targets = None if self.targets is None else self.targets[chosen.to(self.targets.device)]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            output = self.model(pixel_values, semantic_targets=targets, perceptual_distance=self.perceptual)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.model.config.codebook_decay is not None:
            self.model.update_codebook(output.latents, output.image_tokens)
        self.step += 1
        error = F.mse_loss(output.reconstruction.detach(), pixel_values).item()
        summary = {"loss": output.loss.item(), "psnr": 10 * np.log10(4 / error), "usage": output.codebook_usage.item()}
        if output.semantic_loss is not None:
            summary["semantic"] = output.semantic_loss.item()
        if not np.isfinite(summary["loss"]):
            raise ValueError(f"The loss is {summary['loss']} at step {self.step}; a lower --learning-rate may help.")
        return summary

    def save(self) -> None:
        evaluation = evaluate(self.model, self.held_out, self.held_out_targets)
        self.metrics.append({"step": self.step, **evaluation})
        tqdm.write(json.dumps(self.metrics[-1]))
        state = {
            "arguments": {name: getattr(self.args, name) for name in DECISIVE},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        save_checkpoint(self.output, self.step, self.model, state, self.metrics)

    def run(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> list[dict]:
        progress = tqdm(total=self.args.steps, initial=self.step, desc="training")
        while self.step < self.args.steps:
            summary = self.train_step()
            progress.update()
            progress.set_postfix({name: f"{value:.3f}" for name, value in summary.items()})
            if on_step is not None:
                on_step(self.step, summary)
            if self.step % self.args.save_every == 0 or self.step == self.args.steps:
                self.save()
        progress.close()
        save_model(self.output, self.model, self.metrics)
        return self.metrics
