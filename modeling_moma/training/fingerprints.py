# SPDX-License-Identifier: Apache-2.0
"""What a run is made of, held by each of its checkpoints, so that no run goes on from those of another."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ..configuration_moma import MomaConfig
from ..data.documents import TokenFolder
from ..data.packing import PACKING_RULE
from ..data.sources import TRAIN, Source
from ..data.stream import MIXTURE_RULE, STREAM_RULE
from ..errors_moma import InputError
from ..utils.atomic_files import check_new_folder, check_writable, is_of_model
from ..utils.records import files_digest, read_record
from .checkpoints import EARLIER_STEPS, RUN_FILE, data_order, examples_a_step, read_state, whole_checkpoints


# facts by name, in sections
Facts = dict[str, dict[str, Any]]

# settings of a Trainer that may change between two starts of a run: families by the beginning of their names, others
# whole; numbers of steps, records, speed, memory and devices, and what other sections have
_MAY_CHANGE_FAMILIES = (
    *("logging_", "log_", "eval_", "batch_eval_", "include_", "save_", "hub_", "push_to_hub", "trackio_", "report_to"),
    *("fsdp", "deepspeed", "ddp_", "torch_compile", "activation_checkpointing", "gradient_checkpointing", "liger_"),
    *("bf16", "fp16", "tf32", "do_"),
)
_MAY_CHANGE = {
    *("output_dir", "max_steps", "num_train_epochs", "resume_from_checkpoint", "ignore_data_skip"),
    *("disable_tqdm", "run_name", "project", "debug", "skip_memory_metrics", "prediction_loss_only"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "enable_jit_checkpoint"),
    "restore_callback_states_from_checkpoint",
    *("use_cpu", "local_rank", "parallelism_config", "accelerator_config", "use_liger_kernel", "use_cache"),
    *("torch_empty_cache_steps", "full_determinism", "auto_find_batch_size", "remove_unused_columns"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
    *("seed", "data_seed", "per_device_train_batch_size", "per_device_eval_batch_size"),
    "gradient_accumulation_steps",
}
# fields of a source that say where its rows come from: what came of them is in the tokens
_OF_ROWS = ("data", "load", "splits", "held_out", "root")
# characters of a value in a message
_LONGEST_VALUE = 60
_WAYS = "Give another `--output`, or delete this folder to start over."


class RunFingerprint(TrainerCallback, ExportableState):
    """Puts what a run is made of into the state that `Trainer` writes last of all into each checkpoint."""

    def __init__(self, facts: Facts):
        self.facts = facts

    def state(self) -> dict[str, Any]:
        """Return what `Trainer` saves of it."""
        return {"args": {"facts": self.facts}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        """Take the place of what an earlier stage has left, or has not."""
        state.stateful_callbacks[type(self).__name__] = self.state()  # pyright: ignore[reportArgumentType, reportCallIssue, reportOptionalSubscript]


def run_facts(
    config: MomaConfig,
    weights: str | None,
    tokens: TokenFolder,
    sources: Sequence[Source],
    packing: tuple[bool, int],
    arguments: TrainingArguments,
    earlier_steps: int = 0,
    **training: Any,
) -> Facts:
    """Return what a run is made of, as its checkpoints hold it."""
    facts = {
        "model": {**_model_facts(config, weights), "processor": tokens.manifest["fingerprint"]},
        "data": {**_data_facts(tokens, sources, *packing), EARLIER_STEPS: earlier_steps},
        "seed": {"seed": arguments.seed},
        "batch": {"examples_a_step": examples_a_step(arguments)},
        "training": {**_training_facts(arguments), **training},
    }
    # facts are compared as JSON gives them back
    return json.loads(json.dumps(facts, default=str))


def _training_facts(arguments: TrainingArguments) -> dict[str, Any]:
    """Return the settings of a Trainer that decide on the steps, whatever their number and wherever they are taken."""
    names = [entry.name for entry in dataclasses.fields(arguments)]
    counting = [name for name in names if name not in _MAY_CHANGE and not name.startswith(_MAY_CHANGE_FAMILIES)]
    return {name: getattr(arguments, name) for name in counting}


def _model_facts(config: MomaConfig, folder: str | None) -> dict[str, Any]:
    """Return the settings of a model and the source of its weights."""
    # `use_cache` concerns decoding alone
    names = [name for name in MomaConfig.__annotations__ if hasattr(config, name) and name != "use_cache"]
    weights: Any = None
    if folder is not None:
        files = sorted(path for kind in ("*.safetensors", "pytorch_model*.bin") for path in Path(folder).glob(kind))
        # a model named by its Hub id has no local files
        weights = files_digest(files) if files else folder
    return {**{name: getattr(config, name) for name in names}, "weights": weights}


def _data_facts(tokens: TokenFolder, sources: Sequence[Source], packed: bool, sequence_length: int) -> dict[str, Any]:
    """Return what decides on the rows of a training, wherever the tokens lie."""
    facts: dict[str, Any] = {"sources": [source.name for source in sources]}
    for source in sources:
        splits = tokens.manifest["sources"].get(source.name, {}).get("splits", {})
        files = [tokens.folder / name for name in splits.get(TRAIN, {}).get("files", [])]
        fields = {name: value for name, value in source.fields().items() if name not in _OF_ROWS}
        facts[f"source {source.name}"] = {**fields, "weight": source.weight, "tokens": files_digest(files)}
    of_documents = STREAM_RULE if len(sources) == 1 else MIXTURE_RULE
    rule = PACKING_RULE if packed else of_documents
    return {**facts, "packed": packed, "sequence_length": sequence_length, "packing_rule": rule}


def check_output(output: str, facts: Facts, resume: bool, arguments: TrainingArguments | None = None) -> None:
    """Raise for an output folder with checkpoints, or a model, that the run to come must not go on from or write over.

    What a run has left that was killed before its first checkpoint is no hindrance.
    """
    folder = Path(output)
    held = {path.name: read_state(path) for path in whole_checkpoints(folder)}
    if (folder / TRAINER_STATE_NAME).is_file():
        held[TRAINER_STATE_NAME] = read_state(folder)
    records = {name: _facts_of_state(state) for name, state in held.items()}
    # a run may be killed while it writes its model and have no checkpoint
    if not records and (folder / RUN_FILE).is_file() and any(map(is_of_model, folder.glob("*"))):
        records[RUN_FILE] = read_record(folder / RUN_FILE).get("fingerprint")
    for name, then in records.items():
        if then is None:
            raise InputError(
                f"`--output` {output!r} holds another run: {name} does not say what it was made of. {_WAYS}"
            )
        different = difference(then, facts)
        if different:
            ways = _WAYS
            if arguments is not None and difference({**then, "batch": facts["batch"]}, facts) is None:
                ways = f"{_way_to_batch(then['batch']['examples_a_step'], arguments)} {_WAYS}"
            raise InputError(f"`--output` {output!r} holds another run: of {name} {different}. {ways}")
    if not records:
        check_new_folder(output, lambda path: not is_of_model(path))
    elif not resume:
        step = max((state["global_step"] for state in held.values() if state), default=0)
        raise InputError(
            f"`--output` {output!r} holds this run already, {step} steps of it: `--resume` goes on with it. {_WAYS}"
        )
    else:
        check_writable(output)


def check_same_data(model: str | None, facts: Facts) -> None:
    """Raise where a stage would pass over the first steps of other data than the stage before it took."""
    if not facts["data"][EARLIER_STEPS]:
        return
    then = (data_order(str(model)) or {}).get("data", {})
    different = difference({"data": then}, {"data": facts["data"]})
    if different:
        raise InputError(
            f"`--model` {model!r} has taken {facts['data'][EARLIER_STEPS]} steps, which this stage passes over in its "
            f"data, and {different}. --restart-data begins anew in the data."
        )


def finished_at(output: str | Path) -> int | None:
    """Return the step at which the run in a folder was finished, or stopped, with all of its files; `None` before."""
    state = read_state(Path(output))
    return None if state is None else state["global_step"]


def difference(then: Facts, now: Facts) -> str | None:
    """Return the first fact that differs, in words, of those that both have."""
    for section, facts in now.items():
        before = then.get(section, {})
        for name, value in facts.items():
            if name in before and before[name] != value:
                field, old, new = _first_field(name, before[name], value)
                return f"the {section} is another, {field} = {_short(old)} there and {_short(new)} now"
    return None


def _first_field(name: str, then: Any, now: Any) -> tuple[str, Any, Any]:
    """Return the first field in which two mappings differ, however deep, with both values; others as they are."""
    while isinstance(then, dict) and isinstance(now, dict):
        key = next(key for key in {**now, **then} if then.get(key) != now.get(key) or (key in then) != (key in now))
        name, then, now = f"{name}: {key}", then.get(key), now.get(key)
    return name, then, now


def _way_to_batch(examples: int, arguments: TrainingArguments) -> str:
    """Return how a run makes steps of so many examples, by which its place in the data is counted."""
    now, processes = examples_a_step(arguments), arguments.world_size
    accumulated = now // arguments.gradient_accumulation_steps
    factors = f"`per_device_train_batch_size` times `gradient_accumulation_steps` times processes (now {processes})"
    if examples % accumulated == 0:
        way = f"`gradient_accumulation_steps = {examples // accumulated}` makes {examples}"
    elif examples % processes == 0:
        way = f"the first two have to make {examples // processes} together"
    else:
        way = f"nothing makes {examples} of them; start a number of processes that divides it"
    return f"{factors} is the examples of a step, by which the place in the data is counted: {way}."


def _facts_of_state(state: dict[str, Any] | None) -> Facts | None:
    record = ((state or {}).get("stateful_callbacks") or {}).get(RunFingerprint.__name__)
    return record["args"]["facts"] if isinstance(record, dict) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
