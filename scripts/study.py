# SPDX-License-Identifier: Apache-2.0
"""
Trains the runs of docs/study.md and adds a row to its results for each budget that is finished.

    make data data-gloss data-manual
    python scripts/study.py --work FOLDER    train what the plan has and the results lack; twice, for two processes
    python scripts/study.py --work FOLDER --time    time a step of every recipe, with nothing else running
    python scripts/study.py --list           what is finished and what is not

A killed run goes on from its last checkpoint. Tokens and checkpoints stay in `--work`; rows go to `--results`, which
scripts/study_report.py reads. A run is a trunk at one learning rate; for each budget a decay leaves it.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from filelock import FileLock, Timeout

from modeling_moma.cli import tokenize, upcycle
from modeling_moma.cli.pretrain import parse_arguments as pretrain_arguments
from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.data.documents import TokenFolder
from modeling_moma.data.packing import PackedExamples
from modeling_moma.evaluation.held_out import read_held_out
from modeling_moma.evaluation.losses import CAUSAL, source_losses
from modeling_moma.evaluation.measures import load_model
from modeling_moma.modeling_moma import MomaForCausalLM
from modeling_moma.planning.costs import flops_per_token
from modeling_moma.token_groups_moma import token_modalities
from modeling_moma.training.checkpoints import (
    checkpoint_step,
    last_checkpoint,
    read_state,
    without_incomplete_checkpoints,
)
from modeling_moma.training.pretraining import build_trainer, read_parts, training_stream
from modeling_moma.training.recipe import read_recipe
from modeling_moma.training.stage_trainer import StageTrainer
from modeling_moma.utils.atomic_files import atomic_write
from modeling_moma.utils.hardware import keep_freed_memory
from tokenization import MomaProcessor


REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = REPOSITORY / "recipes" / "study.yaml"
# its codes and words are the same on every machine
PROCESSOR = REPOSITORY / "model_cards" / "moma-icons"
RESULTS = REPOSITORY / "docs" / "study" / "runs.parquet"
TIMES = REPOSITORY / "docs" / "study" / "step-times.json"

ONE, FOUR = {"text": 1, "image": 1}, {"text": 4, "image": 4}
HALF = {"intermediate_size": 128, "shared_expert_intermediate_size": {"text": 128, "image": 128}}
TOKEN_CHOICE = {"training_routing": "token_choice", "inference_routing": "token_choice"}
# fields over those of the recipe's dense model; all cost a token the same FLOPs, but for routers and the wide model,
# which has as many parameters as 4t4i in all
RECIPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-wide": {"intermediate_size": 1280},
    "1t1i": {"num_experts": ONE},
    "4t4i-shared-upcycled": {"num_experts": FOUR, **HALF},
    "4t4i-token-choice-shared-upcycled": {"num_experts": FOUR, **HALF, **TOKEN_CHOICE},
}
# millions of tokens of the 1t1i that an upcycled model grows from; they count as its own
SEED_MILLIONS = 4
# positions of a step, steps of a million tokens, and between two points of a curve
ROWS, ROW_TOKENS, CURVE_STEPS = 16, 512, 122
# millions of tokens for which the stream is made that all runs read
LONGEST = 100
WARMUP_STEPS = 100
# of a budget's steps, those in which the learning rate falls to 0
DECAY = 0.2
CONSTANT = {"lr_scheduler_type": "constant_with_warmup"}
# held-out documents of each source: in a point of a curve, and in a row
CURVE_DOCUMENTS, DOCUMENTS = 200, 2000
SPLITS = ("validation", "test")
# rows of the stream in which documents are counted
COUNTED_ROWS = 2000
# of the times: steps of a measurement, and rounds, of which each has a measurement of every recipe
TIMED_STEPS, ROUNDS = 8, 9


@dataclass(frozen=True)
class Run:
    """A trunk, and the budgets in millions of tokens at which a decay ends; `rate` is over the recipe's own."""

    recipe: str
    seed: int
    budgets: tuple[int, ...]
    rate: float = 1.0

    @property
    def name(self) -> str:
        """The run's folder."""
        rate = "" if self.rate == 1 else f"-rate{self.rate:g}"
        return f"0.5M-{self.recipe}{rate}-shipped-seed{self.seed}"

    @property
    def is_upcycled(self) -> bool:
        """Whether it begins as a 1t1i."""
        return self.recipe.endswith("-upcycled")

    @property
    def learning_rate(self) -> float:
        """The largest one."""
        return self.rate * yaml.safe_load(RECIPE.read_text())["trainer"]["learning_rate"]


# in the order in which they are trained
PLAN = (
    *(Run(recipe, seed, (10, 20, 40, 100)) for seed in (6, 7) for recipe in ("dense", "1t1i", "4t4i-shared-upcycled")),
    Run("dense", 6, (40, 100), rate=0.5),
    Run("dense-wide", 6, (20, 40)),
    Run("4t4i-shared-upcycled", 6, (40, 100), rate=0.5),
    Run("dense-wide", 7, (20, 40)),
    Run("4t4i-token-choice-shared-upcycled", 6, (40,)),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the tokens and the checkpoints, outside the repository")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", metavar="RUN", choices=[run.name for run in PLAN])
    parser.add_argument("--up-to", type=int, metavar="M", default=LONGEST, help="budgets of at most M million tokens")
    parser.add_argument("--time", action="store_true", help="time a training step of every recipe, in turns")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(arguments)
    runs = [run for run in PLAN if not args.only or run.name in args.only]
    if args.list:
        done = {(row["run"], row["budget"]) for row in read_rows(args.results)}
        for run in runs:
            marks = [f"{budget}M{' done' if (run.name, budget) in done else ''}" for budget in run.budgets]
            print(f"{run.name}: {', '.join(marks)}")
        return 0
    if args.work is None:
        parser.error("--work: give a folder for tokens and checkpoints")
    keep_freed_memory()
    # two runs side by side would slow each other down with more
    torch.set_num_threads(1)
    prepare(args.work)
    if args.time:
        return time_steps(args.work, TIMES)
    status = 0
    for run in runs:
        try:
            work_on(run, args.work, args.results, args.up_to)
        except Exception:
            # the other runs do not need this one
            traceback.print_exc()
            print(f"{run.name}: not finished", file=sys.stderr, flush=True)
            status = 1
    return status


def prepare(work: Path) -> None:
    """Make the tokens that all runs read; what is there already is kept."""
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / ".tokens.lock"):
        tokenize.main([str(RECIPE), "--processor", str(PROCESSOR), "--output", str(work / "tokens")])


def work_on(run: Run, work: Path, results: Path, up_to: int) -> None:
    """Train the budgets of a run that have no row yet, unless another process does."""
    folder = work / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            for budget in (budget for budget in run.budgets if budget <= up_to):
                if not any((row["run"], row["budget"]) == (run.name, budget) for row in read_rows(results)):
                    print(f"{run.name}: {budget} million tokens", flush=True)
                    add_row(results, row_of(run, budget, work, train_branch(run, budget, work)))
    except Timeout:
        print(f"{run.name}: another process is at it", flush=True)


def steps_of(millions: int) -> int:
    return millions * CURVE_STEPS


def checkpoint_at(folder: Path, step: int) -> Path | None:
    """Return the checkpoint of a step in a folder, `None` before there is one."""
    checkpoint = last_checkpoint(str(folder)) if folder.is_dir() else None
    if checkpoint is None or checkpoint_step(checkpoint) < step:
        return None
    if checkpoint_step(checkpoint) > step:
        raise RuntimeError(f"{folder}: there is no checkpoint of step {step}: was a larger budget trained before?")
    return Path(checkpoint)


def train_branch(run: Run, millions: int, work: Path) -> Path:
    """Train a run to the end of a budget, the smaller ones before it, and return the last checkpoint."""
    folder, steps = work / "runs" / run.name, steps_of(millions)
    trunk, branch, leaves = folder / "trunk", folder / f"{millions}M", round((1 - DECAY) * steps)
    grown = upcycled(run, work) if run.is_upcycled else None
    start = last_checkpoint(str(branch)) if branch.is_dir() else None
    if start is None:
        start = train(run, work, trunk, leaves, CONSTANT, model=grown)
    # an upcycled model has a schedule of its own
    first_step = steps_of(SEED_MILLIONS) if run.is_upcycled else 0
    stable = leaves - first_step - WARMUP_STEPS
    decay = {"num_stable_steps": stable, "num_decay_steps": steps - leaves, "decay_type": "linear"}
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}
    return train(run, work, branch, steps, schedule, start, grown)


def upcycled(run: Run, work: Path) -> Path:
    """Return the model that a run begins with, once its seed is trained and has grown."""
    folder = work / "runs" / run.name
    grown = folder / "grown"
    if not grown.is_dir():
        steps = steps_of(SEED_MILLIONS)
        checkpoint = train(run, work, folder / "seed", steps, CONSTANT, num_experts=ONE)
        # the paper's noise on fresh routers, fading over as many steps as the seed took
        noise = ["--set", f"model.gumbel_noise_steps={steps}", "--seed", str(run.seed)]
        upcycle.main(["--model", str(checkpoint), "--to", "4t4i", "--output", str(grown), *noise])
    return grown


def train(
    run: Run,
    work: Path,
    output: Path,
    stop_at: int,
    schedule: dict[str, Any],
    checkpoint: str | Path | None = None,
    model: Path | None = None,
    **fields: Any,
) -> Path:
    """Take steps until `stop_at`, save there and return that checkpoint; goes on from the folder's own or another."""
    output.mkdir(parents=True, exist_ok=True)
    if done := checkpoint_at(output, stop_at):
        return done
    trainer = trainer_of(run, work, output, stop_at, schedule, model, **fields)
    # of an upcycled model the earlier stage tells the place in the data
    start = checkpoint or last_checkpoint(str(output)) or trainer.earlier_stage
    with without_incomplete_checkpoints(trainer):
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    return Path(f"{output}/checkpoint-{stop_at}")


def trainer_of(
    run: Run,
    work: Path,
    output: Path,
    stop_at: int,
    schedule: dict[str, Any],
    model: Path | None = None,
    **fields: Any,
) -> StageTrainer:
    """Return the trainer of a run; its stream of data is that of the longest budget, whatever it is stopped at."""
    content = yaml.safe_load(RECIPE.read_text())
    content["model"] |= RECIPES[run.recipe] | fields
    content["trainer"] |= {"learning_rate": run.learning_rate, "warmup_steps": WARMUP_STEPS, **schedule}
    content["trainer"] |= {"eval_on_start": False, "disable_tqdm": True, "seed": run.seed, "save_total_limit": 1}
    content["trainer"] |= {"max_steps": steps_of(LONGEST), "per_device_train_batch_size": ROWS}
    content["trainer"] |= dict.fromkeys(("save_steps", "eval_steps", "logging_steps"), CURVE_STEPS)
    recipe = output / "recipe.yaml"
    atomic_write(recipe, lambda path: path.write_text(yaml.safe_dump(content, sort_keys=False)))
    args = pretrain_arguments(
        [
            str(recipe),
            *("--processor", str(PROCESSOR), "--tokens", str(work / "tokens"), "--output", str(output)),
            *("--stop-at", str(stop_at), "--eval-examples", str(CURVE_DOCUMENTS)),
            *(() if model is None else ("--model", str(model))),
        ]
    )
    return build_trainer(args, read_parts(args))


@dataclass(frozen=True)
class Counts:
    """What a stream of packed rows is made of.

    Of each modality its share of the tokens and the mean length of the document that a token stands in; of each source
    its modalities' shares of the tokens.
    """

    tokens: dict[str, float]
    length: dict[str, float]
    shares: dict[str, dict[str, float]]


def count_stream(stream: PackedExamples, sources: Sequence[str], config: MomaConfig) -> Counts:
    """Count the documents of a stream of rows."""
    number, length = dict.fromkeys(config.modalities, 0), dict.fromkeys(config.modalities, 0.0)
    by_source = {source: dict.fromkeys(config.modalities, 0) for source in sources}
    for index in range(len(stream)):
        row = stream[index]
        is_token = row["source_ids"] >= 0
        document = (row["position_ids"] == 0).cumsum(0) - 1
        length_of_token = torch.bincount(document, weights=is_token.double())[document]
        modality_of_token = token_modalities(config, row["input_ids"])
        for place, modality in enumerate(config.modalities):
            chosen = (modality_of_token == place) & is_token
            number[modality] += int(chosen.sum())
            length[modality] += float(length_of_token[chosen].sum())
            for source, count in enumerate(torch.bincount(row["source_ids"][chosen], minlength=len(sources)).tolist()):
                by_source[sources[source]][modality] += count
    total = sum(number.values())
    return Counts(
        {name: count / total for name, count in number.items()},
        {name: length[name] / max(count, 1) for name, count in number.items()},
        {name: {modality: count / total for modality, count in found.items()} for name, found in by_source.items()},
    )


def flops_a_token(config: MomaConfig, counts: Counts) -> float:
    """Return training FLOPs of a token in the mean, attention counted over documents and not over rows."""
    total = 0.0
    for modality, share in counts.tokens.items():
        # FLOPs are linear in the length
        one, two = (flops_per_token(config, modality, length, training=True) for length in (1, 2))
        total += share * (one + (two - one) * (counts.length[modality] - 1))
    return total


def counts_of(run: Run, work: Path, config: MomaConfig) -> Counts:
    """Return the counts of a run's first rows."""
    recipe = read_recipe(RECIPE)
    tokens = TokenFolder(work / "tokens", MomaProcessor.from_pretrained(PROCESSOR))
    stream = training_stream(recipe.data, tokens, recipe.sources, COUNTED_ROWS, run.seed)
    if not isinstance(stream, PackedExamples):
        raise TypeError("the study counts packed rows.")
    return count_stream(stream, [source.name for source in recipe.sources], config)


def held_out_losses(work: Path, model: MomaForCausalLM) -> list[dict[str, Any]]:
    """Return the losses of every split, routing, source and modality, a `dict` each."""
    processor, found = MomaProcessor.from_pretrained(PROCESSOR), []
    for split in SPLITS:
        for source, held_out in read_held_out(str(work / "tokens"), processor, split, DOCUMENTS).items():
            losses = source_losses(model, processor, held_out.documents, 64, name=f"{split} {source}")
            for routing, measured in losses.items():
                # the name of the other one is a warning
                short = routing if routing == CAUSAL else "oracle"
                for modality, targets in measured["targets"].items():
                    if targets and modality != "overall":
                        entry = {"split": split, "routing": short, "source": source, "modality": modality}
                        found.append({**entry, "loss": measured[modality], "targets": targets})
    return found


def curve(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return a point for each million tokens: what the Trainer logged of training and of the held-out documents."""
    points: dict[int, dict[str, float]] = defaultdict(dict)
    chosen = ("_loss", "_uncovered", "_covered_twice", "_peak_load", "learning_rate", "grad_norm", "tokens_per_second")
    for entry in log:
        numbers = {name: float(value) for name, value in entry.items() if isinstance(value, (int, float))}
        kept = {name: value for name, value in numbers.items() if name.endswith(chosen) or name == "loss"}
        points[entry["step"]] |= kept
    return [{"tokens": float(step * ROWS * ROW_TOKENS), **point} for step, point in sorted(points.items())]


def training_seconds(points: Sequence[Mapping[str, float]]) -> float:
    """Return the seconds that steps took, by the median rate of a curve's points, which a pause does not move."""
    rates = [point["tokens_per_second"] for point in points if "tokens_per_second" in point]
    return points[-1]["tokens"] / median(rates)


def hardware() -> dict[str, Any]:
    """Return what the run was trained on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    processor = names[0] if names else platform.processor()
    return {"processor": processor, "amx": "amx_bf16" in flags, "threads": 1, "torch": torch.__version__}


def revision(repository: Path = REPOSITORY) -> str:
    """Return the commit of the code, with a mark where files differ from it; the study's own results are none."""
    git = ["git", "-C", str(repository)]
    name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)docs/study"])
    return name.stdout.strip() + ("-dirty" if changed.returncode else "")


def row_of(run: Run, millions: int, work: Path, checkpoint: Path) -> dict[str, Any]:
    """Return the row of a finished budget: plain values; `config`, `counts`, `curve` and the like are JSON."""
    model = load_model(str(checkpoint), "cpu")
    # as it is saved: a loaded model's also says how it attends
    config = MomaConfig.from_pretrained(checkpoint)
    counts, state = counts_of(run, work, config), read_state(checkpoint)
    points = curve([] if state is None else state["log_history"])
    embeddings, flops = config.vocab_size * config.hidden_size, flops_a_token(config, counts)
    nested = {
        "config": config.to_diff_dict(),
        "hardware": hardware(),
        "counts": dataclasses.asdict(counts),
        "curve": points,
        "losses": held_out_losses(work, model),
    }
    return {
        **{"run": run.name, "recipe": run.recipe, "size": "0.5M", "seed": run.seed, "data": "shipped"},
        **{"learning_rate": run.learning_rate, "budget": millions},
        "tokens": steps_of(millions) * ROWS * ROW_TOKENS,
        "active_parameters": config.num_parameters(active=True) - embeddings,
        "parameters": config.num_parameters() - embeddings,
        "embeddings": embeddings,
        "flops_a_token": flops,
        "flops_a_token_without_head": flops - 3 * 2 * embeddings,
        "seconds": training_seconds(points),
        "revision": revision(),
        **{name: json.dumps(value) for name, value in nested.items()},
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; none where there is no file."""
    return pyarrow.parquet.read_table(path).to_pylist() if path.is_file() else []


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        rows = sorted([*read_rows(path), row], key=lambda entry: (entry["run"], entry["budget"]))
        # a column that only some rows have is none of those that pyarrow infers
        names = list(dict.fromkeys(name for entry in rows for name in entry))
        table = pyarrow.Table.from_pylist([{name: entry.get(name) for name in names} for entry in rows])
        atomic_write(path, lambda aside: pyarrow.parquet.write_table(table, aside, compression="zstd"))


def time_steps(work: Path, path: Path) -> int:
    """Write the seconds of a training step of every recipe, forward, backward and optimizer, measured in turns."""
    seconds: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
    with tempfile.TemporaryDirectory() as folder:
        takers = {recipe: Steps(Run(recipe, 6, ()), work, Path(folder) / recipe) for recipe in RECIPES}
        # the first round is not counted
        for _ in range(1 + ROUNDS):
            for recipe, steps in takers.items():
                seconds[recipe].append(steps.take(TIMED_STEPS) / TIMED_STEPS)
    content = {"size": "0.5M", "revision": revision(), "hardware": hardware(), "rounds": ROUNDS, "steps": TIMED_STEPS}
    content["seconds"] = {recipe: numbers[1:] for recipe, numbers in seconds.items()}
    atomic_write(path, lambda aside: aside.write_text(json.dumps(content, indent=1) + "\n"))
    return 0


class Steps:
    """Training steps of a fresh model of a recipe, on one stream of data for all."""

    def __init__(self, run: Run, work: Path, folder: Path):
        folder.mkdir()
        self._trainer = trainer_of(run, work, folder, steps_of(LONGEST), CONSTANT)
        # `train()` would set it
        self._trainer.current_gradient_accumulation_steps = 1
        self._optimizer = self._trainer.create_optimizer()
        self._model = self._trainer.accelerator.prepare_model(self._trainer.model).train()
        self._batches = iter(self._trainer.get_train_dataloader())

    def take(self, steps: int) -> float:
        """Take steps and return their seconds; batches are read before."""
        batches = list(islice(self._batches, steps))
        began = time.perf_counter()
        for batch in batches:
            self._trainer.training_step(self._model, batch)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
