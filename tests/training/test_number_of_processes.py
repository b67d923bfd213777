# SPDX-License-Identifier: Apache-2.0
"""A pre-training that dies and goes on with another number of processes: its documents and losses."""

import json
import os
import random
from collections import Counter

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value

from helpers import recorded_training
from helpers.mixture import MODEL
from helpers.processes import start_scripts
from helpers.tiny import noise_images, tiny_processor, trainer_flags, write_training
from modeling_moma.cli import pretrain, tokenize
from modeling_moma.data.documents import TokenFolder
from modeling_moma.training.pretraining import training_stream


STEPS, EXAMPLES = 6, 4
# processes, sequences of each at once, batches of a step, the step in which all die; 0: none
FEWER = [(4, 1, 1, 3), (2, 1, 2, 0)]
MORE = [(2, 2, 1, 3), (4, 1, 1, 0)]
# so many more sequences of starts, at random
NUM_RANDOM = int(os.environ.get("PROCESS_CHANGES", "0"))
SPLITS = [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]
BOS = 1


def random_starts(seed):
    """Three deaths and an end, each with a split of its own."""
    rng = random.Random(seed)
    deaths = [*sorted(rng.sample(range(2, STEPS + 1), 3)), 0]
    return [(*rng.choice(SPLITS), dies_in) for dies_in in deaths]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A mixture of two sources, no two of whose documents are alike, and its tokens."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = {"image": noise_images(90), "label": [f"thing {index}" for index in range(90)]}
    features = Features({"image": Image(), "label": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "photos.parquet")
    lines = "\n".join(f"{index} " + "green apple castle " * (1 + index % 9) for index in range(90))
    (folder / "lines.txt").write_text(lines)
    recipe = {
        "sources": {
            "photos": {"data": str(folder / "photos.parquet"), "image": "image", "text": "label", "weight": 0.6},
            "lines": {"data": str(folder / "lines.txt"), "text": "text", "weight": 0.4},
        },
        "data": {"sequence_length": 96, "packed": True},
        "model": MODEL,
        "trainer": {"warmup_steps": 2, "learning_rate": 0.003},
    }
    (folder / "packed.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    recipe["data"]["packed"] = False
    (folder / "padded.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    tiny_processor().save_pretrained(folder / "processor")
    paths = ["--processor", str(folder / "processor"), "--output", str(folder / "tokens")]
    tokenize.main([str(folder / "packed.yaml"), *paths, "--processes", "1"])
    return folder


def arguments(inputs, output, name, batch_size=1, accumulation=1):
    paths = [text for name in ("processor", "tokens") for text in (f"--{name}", str(inputs / name))]
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    often = trainer_flags(max_steps=STEPS, **sizes, save_steps=1, logging_steps=1, bf16=False)
    return [str(inputs / f"{name}.yaml"), *paths, "--output", str(output), *often, "--resume"]


def run(inputs, folder, name, starts):
    """Start a training as often as said; the losses that it ends with, and by step and start what it was given."""
    output, rows, log = folder / "out", folder / "rows", folder / "log.txt"
    rows.mkdir(parents=True)
    for number, (processes, batch_size, accumulation, dies_in) in enumerate(starts):
        given = [str(rows), str(number), str(dies_in), *arguments(inputs, output, name, batch_size, accumulation)]
        for process in start_scripts(recorded_training.main, given, log, processes):
            process.join(120)
            assert process.exitcode == (9 if dies_in else 0), log.read_text()[-3000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], rows


def rows_of(folder, pattern):
    """What all processes were given in a step: `(ids, positions)` of each row, without padding."""
    batches = [batch for path in folder.glob(pattern) for batch in torch.load(path)]
    rows = []
    for batch in batches:
        positions = batch.get("position_ids", torch.zeros(len(batch["input_ids"]), 0))
        rows += zip(batch["input_ids"].tolist(), positions.tolist())
    return Counter((tuple(id_ for id_ in ids if id_ != 0), tuple(map(int, places))) for ids, places in rows)


def stream_of(inputs, name):
    """The examples of all steps, read in order by one process."""
    args = pretrain.parse_arguments(arguments(inputs, inputs / "none", name))
    tokens = TokenFolder(args.tokens, tiny_processor())
    return training_stream(args.recipe.data, tokens, args.recipe.sources, STEPS * EXAMPLES, args.trainer["seed"])


def steps_of(rows, starts):
    """The rows of each step, which are the same in every start that has come to it."""
    steps = []
    for step in range(1, STEPS + 1):
        names = {path.name.rsplit("-", 1)[0] for path in rows.glob(f"{step}-*")}
        first, *others = [rows_of(rows, f"{name}-*") for name in sorted(names)]
        assert first.total() == EXAMPLES and all(other == first for other in others)
        steps.append(first)
    # the steps in which all died were taken again
    deaths = sum(dies_in > 0 for *_, dies_in in starts)
    assert len({path.name.rsplit("-", 1)[0] for path in rows.iterdir()}) == STEPS + deaths
    return steps


@pytest.fixture(scope="module")
def packed(inputs, tmp_path_factory):
    """Losses and rows of the packed stream over 4 and 2 processes."""
    return run(inputs, tmp_path_factory.mktemp("packed"), "packed", FEWER)


def test_losses_are_those_of_a_constant_number_of_processes(inputs, packed, tmp_path):
    constant, _ = run(inputs, tmp_path, "packed", [(1, 1, 4, 0)])
    assert len(constant) == STEPS and packed[0] == pytest.approx(constant, abs=1e-5)


def test_packed_stream_goes_on_at_the_same_document(inputs, packed):
    assert_packed_stream(inputs, packed[1], FEWER)


def assert_packed_stream(inputs, rows, starts):
    """Each step had its examples of the stream, and no document came twice."""
    stream = stream_of(inputs, "packed")
    begun, used = Counter(), [0, 0]
    for step, seen in enumerate(steps_of(rows, starts)):
        examples = [stream[step * EXAMPLES + place] for place in range(EXAMPLES)]
        places = [tuple(example["position_ids"].tolist()) for example in examples]
        ids = [tuple(id_ for id_ in example["input_ids"].tolist() if id_ != 0) for example in examples]
        assert seen == Counter(zip(ids, places))
        for example in examples:
            beginnings = (example["position_ids"] == 0) & (example["input_ids"] == BOS)
            for start in beginnings.nonzero().flatten().tolist():
                # enough of a document to tell it from all others
                begun[tuple(example["input_ids"][start : start + 12].tolist())] += 1
                used[int(example["source_ids"][start])] += 1
    # less than a pass: no document is seen twice, and both sources are there
    assert set(begun.values()) == {1} and min(used) > 10


def assert_padded_stream(inputs, rows, starts):
    """Each step had its documents of the stream, and each document was seen once."""
    stream = stream_of(inputs, "padded")
    documents = [tuple(stream[index]["input_ids"]) for index in range(STEPS * EXAMPLES)]
    assert set(Counter(documents).values()) == {1}
    for step, seen in enumerate(steps_of(rows, starts)):
        expected = Counter(documents[step * EXAMPLES : (step + 1) * EXAMPLES])
        assert Counter({ids: count for (ids, _), count in seen.items()}) == expected


def test_documents_of_their_own_are_seen_once_each(inputs, tmp_path):
    _, rows = run(inputs, tmp_path, "padded", MORE)
    assert_padded_stream(inputs, rows, MORE)


def evaluation(folder, processes, examples):
    """What is logged of the held-out documents before the first step, but for times and means of forwards."""
    output, log = folder / f"{processes}-{examples}", folder / "log.txt"
    paths = ["--processor", folder / "processor", "--tokens", folder / "tokens", "--output", output]
    sizes = trainer_flags(max_steps=1, per_device_train_batch_size=4 // processes, bf16=False)
    sizes += ["--eval-examples", examples]
    given = [*map(str, [folder / "recipe.json", *paths, *sizes])]
    for process in start_scripts(pretrain.main, given, log, processes):
        process.join(120)
        assert process.exitcode == 0, log.read_text()[-3000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    (figures,) = [entry for entry in history if "eval_image_loss" in entry and entry["step"] == 0]
    names = ("_loss", "uncovered", "covered_twice")
    return {name: value for name, value in figures.items() if name.endswith(names)}


@pytest.mark.parametrize("examples", [3, 5])
def test_held_out_documents_count_once_on_any_number_of_processes(tmp_path, examples):
    write_training(tmp_path)
    one, two = (evaluation(tmp_path, processes, examples) for processes in (1, 2))
    assert len(one) == 7 and two == pytest.approx(one, rel=1e-5)


@pytest.mark.skipif(not NUM_RANDOM, reason="minutes: PROCESS_CHANGES=8 says how many sequences")
@pytest.mark.parametrize("seed", range(max(NUM_RANDOM, 1)))
def test_random_numbers_of_processes(inputs, tmp_path, seed):
    name, starts = ("packed", "padded")[seed % 2], random_starts(seed)
    _, rows = run(inputs, tmp_path, name, starts)
    {"packed": assert_packed_stream, "padded": assert_padded_stream}[name](inputs, rows, starts)
