# SPDX-License-Identifier: Apache-2.0
"""What the study measures of a finished branch: held-out losses, and what its training has cost."""

import dataclasses
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from modeling_moma.calibration.observation import RouterRecord, has_routers, observed_routers, router_place
from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.data.documents import TokenFolder
from modeling_moma.data.packing import PackedExamples
from modeling_moma.evaluation.held_out import read_held_out
from modeling_moma.evaluation.losses import CAUSAL, source_losses
from modeling_moma.evaluation.measures import load_model
from modeling_moma.modeling_moma import MomaForCausalLM
from modeling_moma.planning.costs import flops_per_token
from modeling_moma.token_groups_moma import token_modalities
from modeling_moma.training.pretraining import training_stream
from modeling_moma.training.recipe import read_recipe
from tokenization import MomaProcessor

from .grid import Run
from .training import Study, log_of


# held-out documents of each source and split in a row of the study
DOCUMENTS = 2000
SPLITS = ("validation", "test")
# rows of the stream in which documents are counted
COUNTED_ROWS = 2000
# rows of the stream in which experts are counted
ROUTED_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a stream of packed rows is made of.

    Args:
        tokens (`dict[str, float]`):
            share of each modality among its tokens.
        length (`dict[str, float]`):
            tokens of the document that a token of each modality stands in, in the mean.
        shares (`dict[str, dict[str, float]]`):
            share of each source's modalities among the tokens.
    """

    tokens: dict[str, float]
    length: dict[str, float]
    shares: dict[str, dict[str, float]]


def count_stream(stream: PackedExamples, sources: Sequence[str], config: MomaConfig) -> Counts:
    """Count the documents of a stream of rows.

    Args:
        stream (`PackedExamples`):
            of which all rows are read.
        sources (`Sequence[str]`):
            their names, in the stream's order.
        config (`MomaConfig`):
            tells modalities by ids.
    """
    number, length = dict.fromkeys(config.modalities, 0), dict.fromkeys(config.modalities, 0.0)
    by_source = {source: dict.fromkeys(config.modalities, 0) for source in sources}
    for index in range(len(stream)):
        row = stream[index]
        is_token = row["source_ids"] >= 0
        document = (row["position_ids"] == 0).cumsum(0) - 1
        length_of_document = torch.bincount(document, weights=is_token.double())
        length_of_token = length_of_document[document]
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


def flops_a_token(config: MomaConfig, counts: Counts, with_head: bool) -> float:
    """Return training FLOPs of a token in the mean, attention counted over documents and not over rows.

    Args:
        config (`MomaConfig`):
            the model.
        counts ([`Counts`]):
            of the stream.
        with_head (`bool`):
            whether logits count.
    """
    total = 0.0
    for modality, share in counts.tokens.items():
        # FLOPs are linear in the length
        one, two = (flops_per_token(config, modality, length, training=True) for length in (1, 2))
        total += share * (one + (two - one) * (counts.length[modality] - 1))
    head = 3 * 2 * config.hidden_size * config.vocab_size
    return total if with_head else total - head


def stream_of(study: Study, run: Run) -> PackedExamples:
    """Return rows of a run's training, fewer than it takes."""
    recipe = read_recipe(study.recipe)
    tokens = TokenFolder(study.tokens / run.data, MomaProcessor.from_pretrained(study.processor_of(run.data)))
    stream = training_stream(recipe.data, tokens, recipe.sources, COUNTED_ROWS, run.seed)
    if not isinstance(stream, PackedExamples):
        raise TypeError("the study counts packed rows.")
    return stream


def counts_of(study: Study, stream: PackedExamples, config: MomaConfig) -> Counts:
    """Return the counts of a run's stream."""
    return count_stream(stream, [source.name for source in read_recipe(study.recipe).sources], config)


@torch.no_grad()
def experts_met(model: MomaForCausalLM, rows: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Return how many routed experts take a token, in the mean, for each layer and modality.

    In a pool that several modalities share expert choice may give one of them most of what is computed.

    Args:
        model (`MomaForCausalLM`):
            in `eval()` mode.
        rows (`Mapping[str, torch.Tensor]`):
            the model's inputs, `[B, T]` each, without padding.

    Returns:
        `list[dict[str, Any]]`: `layer`, `modality`, and the number of experts at inference (`causal`) and of experts
        that choose among all these tokens (`oracle`); none for groups of one expert.
    """
    config = model.config
    if not has_routers(config):
        return []
    modality_N = token_modalities(config, rows["input_ids"]).flatten()
    skipping: dict[int, torch.Tensor] = {}
    found = []

    def observe(record: RouterRecord):
        layer, group = router_place(record.name)
        # a depth layer asks its depth router first, and its experts see what that has chosen
        if group is None:
            skipping[layer] = ~record.is_taken_NS.squeeze(1)
            return
        places = {name: config.modalities.index(name) for name in config.expert_groups[group]}
        is_mine_N = torch.isin(modality_N, torch.tensor(list(places.values())))
        if layer in skipping:
            is_mine_N &= ~skipping[layer]
        for name, place in places.items():
            is_asked_N = modality_N[is_mine_N] == place
            numbers = {
                "causal": record.is_taken_NS[is_asked_N].sum(1).double().mean().item(),
                "oracle": record.is_member_NS[is_asked_N].sum(1).double().mean().item(),
            }
            found.append({"layer": layer, "modality": name, **numbers})

    with observed_routers(model, observe):
        model.base_model(**rows, use_cache=False)
    return found


def routed_rows(stream: PackedExamples) -> dict[str, torch.Tensor]:
    """Return the first rows of a stream as inputs of the model, `[B, T]` each."""
    examples = [stream[index] for index in range(min(ROUTED_ROWS, len(stream)))]
    return {name: torch.stack([example[name] for example in examples]) for name in ("input_ids", "position_ids")}


def held_out_losses(study: Study, run: Run, model: MomaForCausalLM) -> list[dict[str, Any]]:
    """Return the losses of every split, routing, source and modality, a `dict` each.

    Args:
        study ([`Study`]):
            see there.
        run ([`Run`]):
            see there.
        model (`MomaForCausalLM`):
            in `eval()` mode.
    """
    processor = MomaProcessor.from_pretrained(study.processor_of(run.data))
    found = []
    for split in SPLITS:
        for source, held_out in read_held_out(str(study.tokens / run.data), processor, split, DOCUMENTS).items():
            losses = source_losses(model, processor, held_out.documents, 64, name=f"{split} {source}")
            for routing, measured in losses.items():
                # the name of the other one is a warning
                short = routing if routing == CAUSAL else "oracle"
                for modality, targets in measured["targets"].items():
                    if targets and modality != "overall":
                        entry = {"split": split, "routing": short, "source": source, "modality": modality}
                        found.append({**entry, "loss": measured[modality], "targets": targets})
    return found


def curve(log: list[dict[str, Any]], step_tokens: int) -> list[dict[str, float]]:
    """Return a point for each million tokens: what was logged of training and of the held-out documents.

    Args:
        log (`list[dict]`):
            the Trainer's.
        step_tokens (`int`):
            positions of a step.
    """
    points: dict[int, dict[str, float]] = {}
    for entry in log:
        numbers = {name: float(value) for name, value in entry.items() if isinstance(value, (int, float))}
        points.setdefault(entry["step"], {}).update(numbers)
    chosen = ("_loss", "_uncovered", "_covered_twice", "_peak_load", "learning_rate", "grad_norm", "tokens_per_second")
    return [
        {
            "tokens": float(step * step_tokens),
            **{name: value for name, value in point.items() if name.endswith(chosen) or name == "loss"},
        }
        for step, point in sorted(points.items())
    ]


def training_seconds(points: Sequence[Mapping[str, float]]) -> float:
    """Return the seconds that steps took, by the median rate of a curve's points.

    Evaluations are left out by the rates, and what else slowed the machine for a while, or stopped it, by the median.
    """
    return points[-1]["tokens"] / median(
        point["tokens_per_second"] for point in points if "tokens_per_second" in point
    )


def hardware() -> dict[str, Any]:
    """Return what the run was trained on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return {
        "processor": names[0] if names else platform.processor(),
        "amx": "amx_bf16" in flags,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def revision(repository: Path) -> str:
    """Return the commit of the code, with a mark where files differ from it; the study's own results are none."""
    git = ["git", "-C", str(repository)]
    name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)docs/study"])
    return name.stdout.strip() + ("-dirty" if changed.returncode else "")


def row(study: Study, run: Run, millions: int, checkpoint: Path, repository: Path) -> dict[str, Any]:
    """Return the row of a finished branch.

    Args:
        study ([`Study`]):
            see there.
        run ([`Run`]):
            see there.
        millions (`int`):
            the budget.
        checkpoint (`Path`):
            the branch's last.
        repository (`Path`):
            whose commit is named.

    Returns:
        `dict`: plain values; `config`, `hardware`, `counts`, `curve`, `losses` and `experts` are JSON.
    """
    model, stream = load_model(str(checkpoint), "cpu"), stream_of(study, run)
    # as it is saved: a loaded model's also says how it attends
    config = MomaConfig.from_pretrained(checkpoint)
    counts, points = counts_of(study, stream, config), curve(log_of(checkpoint), study.pace.step_tokens)
    flops = {name: flops_a_token(config, counts, name == "with_head") for name in ("with_head", "without_head")}
    embeddings, steps = config.vocab_size * config.hidden_size, study.pace.steps(millions)
    nested: Mapping[str, Any] = {
        "config": config.to_diff_dict(),
        "hardware": hardware(),
        "counts": dataclasses.asdict(counts),
        "curve": points,
        "losses": held_out_losses(study, run, model),
        "experts": experts_met(model, routed_rows(stream)),
    }
    return {
        "run": run.name,
        "recipe": run.recipe,
        "size": run.size,
        "seed": run.seed,
        "data": run.data,
        "learning_rate": run.learning_rate,
        "budget": millions,
        "steps": steps,
        "tokens": steps * study.pace.step_tokens,
        "active_parameters": config.num_parameters(active=True) - embeddings,
        "parameters": config.num_parameters() - embeddings,
        "embeddings": embeddings,
        "flops_a_token": flops["with_head"],
        "flops_a_token_without_head": flops["without_head"],
        "seconds": training_seconds(points),
        "revision": revision(repository),
        **{name: json.dumps(value) for name, value in nested.items()},
    }
