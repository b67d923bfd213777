# SPDX-License-Identifier: Apache-2.0
"""Training of the image tokenizer on the images of a recipe's sources."""

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from tokenization.augmentation_moma import augment_images
from tokenization.modeling_moma_vq import MomaVQModel
from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork

from ..data.jobs import source_digest
from ..data.sources import Source, warn_of_shared_rows
from ..errors_moma import InputError
from ..utils.atomic_files import check_new_folder, is_of_model, replace_folder, write_folder_aside
from ..utils.errors import MissingExtraError, needs_extra
from ..utils.hardware import trains_in_bf16
from ..utils.messages import one_line
from .checkpoints import checkpoint_step, numbered_checkpoints
from .fingerprints import difference
from .image_store import ImageStore, image_fields, open_store, take, to_pixel_values
from .image_targets import CaptionTraining, SemanticTargets
from .reconstruction_measures import PERCEPTUAL_DISTANCE, SAMPLES_FILE, evaluate
from .tokenizer_settings import TokenizerSettings, asked_fields, check_used, read_config


STATE_FILE, METRICS_FILE, REPORT_FILE = "training_state.pt", "metrics.json", "report.json"
# folder of the decoded images
IMAGES_FOLDER = "images"
# latents that give the codebook at the start, and the fewest images that they are of
CODEBOOK_LATENTS, CODEBOOK_IMAGES = 256 * 64, 32
# steps between two such starts during warm-up
CODEBOOK_INTERVAL = 20
# settings without which a run would end elsewhere; the model's own are in its configuration
DECISIVE = ("steps", "batch_size", "learning_rate", "warmup_steps", "seed")
DECISIVE += ("caption_weight", "augmentation", "do_pad", "held_out_images")


@functools.lru_cache(maxsize=2)
def epoch_order(num_images: int, seed: int) -> torch.Tensor:
    """Return a random order of all images, kept because each step of an epoch asks for it."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))


def batch_indices(step: int, batch_size: int, num_images: int, seed: int) -> torch.Tensor:
    """Return the images of one step: each epoch's order follows from the step alone, so that runs can resume."""
    epoch, position = divmod(step, max(num_images // batch_size, 1))
    order = epoch_order(num_images, seed + 7919 * epoch)
    return order[position * batch_size : (position + 1) * batch_size]


def codebook_images(config: Any) -> int:
    """Return how many images give the codebook at the start: of larger ones, which have more codes, fewer."""
    codes = (config.resolution // config.downsample_factor) ** 2
    return max(CODEBOOK_LATENTS // codes, CODEBOOK_IMAGES)


def checkpoints(output: Path) -> list[Path]:
    """Return the complete checkpoints of a folder, oldest first."""
    return numbered_checkpoints(output)[::-1]


def save_checkpoint(output: Path, step: int, model: MomaVQModel, state: dict, metrics: list[dict]) -> None:
    """Write aside, rename, and only then remove the older checkpoints: a kill at any moment leaves a complete one."""
    older = checkpoints(output)
    final = output / f"checkpoint-{step:07d}"

    def write(folder: Path):
        model.save_pretrained(folder)
        torch.save({"step": step, "metrics": metrics, **state}, folder / STATE_FILE)

    replace_folder(final, write)
    for path in older:
        if path != final:
            shutil.rmtree(path)


def read_checkpoint(folder: Path) -> tuple[MomaVQModel, dict[str, Any]]:
    """Return the model of a checkpoint, and what else [`save_checkpoint`] wrote."""
    try:
        model = MomaVQModel.from_pretrained(folder)
        return model, torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    # readers of files fail in any way
    except Exception as error:
        raise InputError(
            f"`--output` {str(folder.parent)!r}: {folder.name} cannot be read; was it copied in part, or changed? "
            f"Delete it, and the run goes on from the checkpoint before it or begins anew "
            f"({type(error).__name__}: {one_line(error, 300)})."
        ) from error


def check_folder(output: Path, resume: bool) -> None:
    """Raise for a folder with a run, or a model, that is not to be gone on from."""
    begun = checkpoints(output)
    if begun and not resume:
        step = checkpoint_step(begun[-1])
        raise InputError(
            f"`--output` {str(output)!r} holds a run already, {step} steps of it: `--resume` goes on with it. Give "
            "another `--output`, or delete this folder to start over."
        )
    if not begun:
        check_new_folder(str(output), lambda path: not is_of_model(path))


def check_resumed(output: Path, settings: TokenizerSettings, config: Any, begun: Mapping[str, Any]) -> None:
    """Compare the settings with what a checkpoint was begun with; what they leave out is the checkpoint's."""
    asked = asked_fields(settings)
    if settings.config:
        now = read_config(settings)
        asked |= {name: getattr(now, name) for name in type(now).__annotations__}
    then = {name: getattr(config, name) for name in asked} | dict(begun)
    asked |= {name: getattr(settings, name) for name in begun}
    # JSON knows no tuples, which are lists in a saved configuration
    check_same(output, *(json.loads(json.dumps({"training": facts})) for facts in (then, asked)))


def check_same(output: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise where a run would go on that was begun with other settings or images."""
    if different := difference(dict(then), dict(now)):
        raise InputError(
            f"--resume: `--output` {str(output)!r} holds another run: {different}. Resume with the settings and the "
            "data of the first start, or give a new `--output`."
        )


def save_model(output: Path, model: MomaVQModel, metrics: list[dict], report: dict[str, Any]) -> None:
    """Write the finished model, its metrics, and what became of the images."""

    def save(folder: Path):
        model.save_pretrained(folder)
        for name, content in ((METRICS_FILE, metrics), (REPORT_FILE, report)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")

    write_folder_aside(output, save)


class TokenizerTraining:
    """The model, its images and its optimizer; `run` trains to the last step."""

    def __init__(
        self,
        settings: TokenizerSettings,
        sources: list[Source],
        output: str | Path,
        resume: bool = False,
        strict: bool = False,
    ):
        self.settings, self.sources, self.output, self.strict = settings, sources, Path(output), strict
        check_folder(self.output, resume)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = trains_in_bf16(settings.bf16, self.device)
        self.step, self.metrics = 0, []
        state = self._make_model(resume)
        self._make_optimizer()
        self.facts: dict[str, Any] = {
            "sources": [image_fields(source) for source in sources],
            "files": {source.name: source_digest(source) for source in sources},
        }
        # check first: opening the store may replace the images of the first start
        if state is not None:
            check_same(self.output, {"data": state["images"]}, {"data": self.facts})
        self.store = self._open_images()
        self.facts["images"] = len(self.store.train)
        if state is not None:
            check_same(self.output, {"data": state["images"]}, {"data": self.facts})
        self.captions = None
        if settings.caption_weight > 0:
            self.captions = CaptionTraining(
                settings.caption_weight,
                sources,
                self.store,
                self.model.config,
                settings.learning_rate,
                settings.seed,
                self.device,
            )
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.captions is not None:
                self.captions.load_state_dict(state["captions"])
        self._prepare_teacher()

    def _make_model(self, resume: bool) -> dict[str, Any] | None:
        settings, state = self.settings, None
        if resume and checkpoints(self.output):
            folder = checkpoints(self.output)[-1]
            self.model, state = read_checkpoint(folder)
            check_resumed(self.output, settings, self.model.config, state.get("arguments", {}))
            self.step, self.metrics = state["step"], state["metrics"]
            is_done = self.step >= settings.steps
            print("this run has taken all of its steps" if is_done else f"resuming from step {self.step}")
        else:
            config = read_config(settings)
            check_used(settings, config)
            torch.manual_seed(settings.seed)
            self.model = MomaVQModel(config)
        self.model = self.model.to(self.device, memory_format=torch.channels_last).train()
        return state

    def _make_optimizer(self) -> None:
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=self.settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=1e-4,
            fused=True,
        )
        self.scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            self.optimizer, self.settings.warmup_steps, self.settings.steps, min_lr_rate=0.02
        )

    def _open_images(self) -> ImageStore:
        warn_of_shared_rows(self.sources, {source.name: source.split_names() for source in self.sources})
        store = open_store(
            self.output / IMAGES_FOLDER,
            self.sources,
            self.model.config.resolution,
            self.settings.held_out_images,
            self.strict,
            self.settings.do_pad,
        )
        print(store.summary())
        return store

    def _prepare_teacher(self) -> None:
        config = self.model.config
        self.targets: SemanticTargets | None = None
        self.perceptual = None
        wants_semantics = config.semantic_dim is not None and config.semantic_weight > 0
        fresh_trunk = self.model.encoder.trunk if self.step == 0 else None
        is_needed = wants_semantics or fresh_trunk is not None or config.perceptual_weight > 0
        self.teacher = self._load_teacher(is_needed)
        if self.teacher is None:
            return
        if fresh_trunk is not None:
            fresh_trunk.load_imagenet_weights(self.teacher.network)
        if wants_semantics:
            if config.semantic_dim != self.teacher.feature_dim:
                raise InputError(
                    f"semantic_dim={config.semantic_dim}, but the teacher gives {self.teacher.feature_dim}."
                )
            num_uses = self.settings.steps * self.settings.batch_size
            self.targets = SemanticTargets(self.teacher, self.store, num_uses, self.bf16, self.device)
        if config.perceptual_weight > 0:
            self.perceptual = self.teacher.distance

    def _load_teacher(self, is_needed: bool) -> MomaVQPerceptualNetwork | None:
        try:
            with needs_extra("images are compared by a trained network", "train"):
                teacher = MomaVQPerceptualNetwork()
        except MissingExtraError as error:
            if is_needed:
                raise
            print(f"{PERCEPTUAL_DISTANCE} is left out of the evaluation: {error}")
            return None
        return teacher.to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def train_step(self) -> dict[str, float]:
        """Take one step of the optimizer, and return what a progress bar shows."""
        # everything random follows from the step, so a resumed run repeats what the killed one would have done
        torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
        images = self.store.train
        chosen = batch_indices(self.step, self.settings.batch_size, len(images), self.settings.seed)
        pixel_values = self._augment(to_pixel_values(take(images, chosen), self.device))
        # during warm-up the latents move faster than the codebook's averages, so it is initialised again
        if self.step == 0 or (self.step < self.settings.warmup_steps and self.step % CODEBOOK_INTERVAL == 0):
            first = torch.randperm(len(images))[: codebook_images(self.model.config)]
            self.model.initialize_codebook(to_pixel_values(take(images, first), self.device))
        targets = None if self.targets is None else self.targets.of(chosen)
        caption_loss = None
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            output = self.model(pixel_values, semantic_targets=targets, perceptual_distance=self.perceptual)
            loss = output.loss
            if self.captions is not None:
                term, caption_loss = self.captions.term(output, chosen)
                loss = loss + term
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.captions is not None:
            self.captions.step()
        if self.model.config.codebook_decay is not None:
            self.model.update_codebook(output.latents, output.image_tokens)
        self.step += 1
        return self._summarise(output, pixel_values, loss, caption_loss)

    def _augment(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.settings.augmentation == "none":
            return pixel_values
        return augment_images(pixel_values, fill=self.settings.augmentation)

    def _summarise(
        self, output: Any, pixel_values: torch.Tensor, loss: torch.Tensor, caption_loss: torch.Tensor | None
    ) -> dict[str, float]:
        error = F.mse_loss(output.reconstruction.detach(), pixel_values)
        figures = {"loss": loss, "psnr": error, "usage": output.codebook_usage}
        if output.semantic_loss is not None:
            figures["semantic"] = output.semantic_loss
        if caption_loss is not None:
            figures["caption"] = caption_loss
        # read at once: each read waits for the device
        values = torch.stack([value.detach().float() for value in figures.values()]).tolist()
        summary = dict(zip(figures, values))
        if not np.isfinite(summary["loss"]):
            raise InputError(f"The loss is {summary['loss']} at step {self.step}; a lower `learning_rate` may help.")
        return {**summary, "psnr": 10 * np.log10(4 / summary["psnr"])}

    def save(self) -> None:
        """Evaluate on the held-out images, and write samples and a checkpoint."""
        held_out_targets = None if self.targets is None else self.targets.held_out
        samples = self.output / SAMPLES_FILE
        evaluation = evaluate(self.model, self.store.held_out, held_out_targets, self.teacher, samples)
        diverged = [name for name, value in evaluation.items() if np.isnan(value)]
        if diverged:
            raise InputError(
                f"`{diverged[0]}` of the held-out images is not a number at step {self.step}: the training has "
                "diverged, and this step is not saved. Begin anew with a lower `learning_rate`."
            )
        self.metrics.append({"step": self.step, **evaluation})
        tqdm.write(json.dumps(self.metrics[-1]))
        state = {
            "arguments": {name: getattr(self.settings, name) for name in DECISIVE},
            "images": self.facts,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        if self.captions is not None:
            state["captions"] = self.captions.state_dict()
        save_checkpoint(self.output, self.step, self.model, state, self.metrics)

    def run(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> list[dict]:
        """Train to the last step."""
        progress = tqdm(total=self.settings.steps, initial=self.step, desc="training")
        while self.step < self.settings.steps:
            summary = self.train_step()
            progress.update()
            progress.set_postfix({name: f"{value:.3f}" for name, value in summary.items()})
            if on_step is not None:
                on_step(self.step, summary)
            if self.step % self.settings.save_every == 0 or self.step == self.settings.steps:
                self.save()
        progress.close()
        save_model(self.output, self.model, self.metrics, self.store.report)
        return self.metrics
