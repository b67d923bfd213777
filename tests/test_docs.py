# SPDX-License-Identifier: Apache-2.0
"""What README and the pages say can be done: their Python runs, their commands exist and run small, the site builds.

A block that cannot run stands below a line `<!-- not run: REASON -->`, its reason one of `REASONS`, maybe with more
after a comma or colon. Of `make` only the targets are checked, and of commands within a sentence only the options.
"""

import contextlib
import functools
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from PIL import Image
from transformers import LlamaConfig

import make_text_model
import modeling_moma
import tokenization
from helpers.released import skip_without_released_model, write_shallow
from helpers.slow import slow
from helpers.sounds import as_file, tone
from modeling_moma.cli.main import SUBCOMMANDS
from modeling_moma.cli.main import main as moma
from modeling_moma.labelling.labeler import open_labeler
from modeling_moma.labelling.memory import MEMORY_FILE, ImageMemory


ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
CARDS = [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("model_cards/*/README.md"))]
REASONS = (
    "needs GPUs",
    "needs a cluster",
    "needs hours",
    "needs the Hub",
    "needs a download",
    "needs a checkpoint",
    "needs a server",
    "illustrates an error",
)
LINKED = ("data", "configs", "recipes", "scripts")
# pages whose commands run here, one after the other in one folder
WORKED_EXAMPLES = (
    ("docs/how-to/start-from-a-text-model.md",),
    ("docs/how-to/pre-train.md", "docs/how-to/upcycle.md"),
    ("docs/how-to/own-data.md",),
    ("docs/how-to/audio.md",),
    ("docs/how-to/evaluate.md",),
    ("docs/how-to/label.md",),
    ("docs/how-to/push.md",),
    ("docs/concepts/routing.md",),
    ("docs/how-to/scaling.md",),
    ("README.md",),
)
# pages that run with the released models as they ship
FIRST_PAGES = ("README", "docs/quick-start")
# commands of the shell itself
SHELL = ("test",)
# that take long, and show what tests of their own show
SLOW_PAGES = ("docs/how-to/export.md", "docs/how-to/push.md", "docs/concepts/routing.md")
# what makes a command small enough for a test
SMALLER = {
    "make_text_model": {"--layers": "1"},
    "train-image-tokenizer": {"--set": ["image_tokenizer.steps=2", "image_tokenizer.batch_size=2"]},
    "build-processor": {"--set": ["processor.vocab_size=300"]},
    "tokenize": {"--processes": "1"},
    "pretrain": {
        "--set": ["trainer.max_steps=2", "trainer.per_device_train_batch_size=2", "trainer.eval_steps=2"],
        "--eval-examples": "2",
    },
    "scripts/quickstart.py": {"--images": "1"},
    "evaluate": {"--limit": "8", "--batch-size": "8"},
}
# what makes a recipe and Python of a page small enough
SMALLER_TEXT = {
    "config: medium-256,": "config: small,",
    "num_hidden_layers: 6": "num_hidden_layers: 2",
    "limit=100)": "limit=8)",
}
# replaced where the page has them
SMALLER_IF_THERE = {"pretrain": {"--stop-at": "1"}}
_BLOCK = re.compile(
    r"^(?: *<!-- not run: (?P<reason>.*?) -->\n)? *```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^ *``` *$",
    re.DOTALL | re.MULTILINE,
)
_INLINE = re.compile(r"(?<!`)`((?:python (?:scripts|benchmarks)/|moma )[^`]+)`(?!`)")
_SCRIPT = re.compile(r"(?:\./)?((?:scripts|benchmarks)/[\w/]+\.(?:py|sh))")


class Block(NamedTuple):
    """A fenced block of a page."""

    code: str
    line: int
    reason: str | None


def blocks(page: Path, language: str) -> list[Block]:
    """The page's blocks of a language, in their order."""
    text = page.read_text()
    return [
        Block(textwrap.dedent(found["code"]), text.count("\n", 0, found.start("code")), found["reason"])
        for found in _BLOCK.finditer(text)
        if found["language"] == language
    ]


def name_of(page: Path) -> str:
    """A readable parameter id."""
    return str(page.relative_to(ROOT))


def slow_if_long(case, name: str):
    """A case of a test, which runs with RUN_SLOW=1 alone where it takes long."""
    return pytest.param(case, marks=slow if name in SLOW_PAGES else ())


def commands(code: str) -> list[list[str]]:
    """The simple commands of shell code, word by word, without comments."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            ends = [place for place, word in enumerate(words) if word in ("&&", "||", "|", ";", "&")]
            stop = ends[0] if ends else len(words)
            found.append(words[:stop])
            words = words[stop + 1 :]
    # settings before a command are none of its words
    found = [[word for n, word in enumerate(words) if n or not re.match(r"\w+=", word)] for words in found]
    return [words for words in found if words]


def script_of(words: list[str]) -> tuple[str | None, list[str]]:
    """The script of this repository or the subcommand of `moma` that a command runs, and the words after it."""
    if words[0] == "moma" and len(words) > 1 and not words[1].startswith("-"):
        return words[1], words[2:]
    for place, word in enumerate(words):
        if word == "modeling_moma" and words[place - 1] == "-m":
            return words[place + 1], words[place + 2 :]
        found = _SCRIPT.fullmatch(word)
        if found:
            return found[1], words[place + 1 :]
    return None, []


@functools.cache
def options_of(script: str, subcommand: tuple[str, ...]) -> set[str]:
    """Options that a script or a subcommand names in its help."""
    printed, argv = io.StringIO(), sys.argv
    sys.argv = [script, *subcommand, "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            if script in SUBCOMMANDS:
                moma([script, *subcommand, "--help"])
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = argv
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", printed.getvalue()))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.fixture(scope="module")
def model_cards(tmp_path_factory):
    """The released models with few layers."""
    skip_without_released_model()
    folder = tmp_path_factory.mktemp("released") / "model_cards"
    for name in ("moma-emoji", "moma-icons"):
        write_shallow(ROOT / "model_cards" / name, folder / name)
    # the memory beside the one of icons is of all its layers
    labeler = open_labeler(str(folder / "moma-icons"))
    states = torch.randn(4, labeler.model.config.hidden_size)
    ImageMemory.build(states, list("abcd"), [[]] * 4, *labeler.probe()).save(folder / "moma-icons" / MEMORY_FILE)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch, model_cards, request):
    """A working folder in which the paths of pages lead somewhere: of the first ones, to the models as they ship."""
    is_first = request.node.callspec.id.removesuffix(".md") in FIRST_PAGES
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards" if is_first else model_cards)
    for folder in LINKED:
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shrunk(text: str) -> str:
    """A recipe or Python of a page with smaller numbers."""
    for shown, smaller in SMALLER_TEXT.items():
        text = text.replace(shown, smaller)
    return text


@pytest.mark.parametrize(
    "page", [slow_if_long(page, name_of(page)) for page in PAGES if blocks(page, "python")], ids=name_of
)
def test_python_of_the_page_runs(page, workplace, monkeypatch):
    if page.name == "evaluate.md":
        # each report would read the thousands of tasks that the harness has
        monkeypatch.setattr(evaluator, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    namespace = {"__name__": page.stem}
    for block in blocks(page, "python"):
        if block.reason is None:
            # lines of errors are those of the page
            code = "\n" * block.line + shrunk(block.code)
            exec(compile(code, name_of(page), "exec"), namespace)
    for image in workplace.glob("*.png"):
        Image.open(image).load()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_that_are_not_run_say_why(page):
    for language in ("python", "bash"):
        for block in blocks(page, language):
            known = block.reason is None or re.match(rf"({'|'.join(REASONS)})($|[,:])", block.reason)
            assert known, f"line {block.line}: {block.reason!r} is none of {REASONS}"
    # other names of the same languages would be left out of all this
    languages = re.findall(r"^ *```(\w+)", page.read_text(), flags=re.MULTILINE)
    assert not {"py", "python3", "pycon", "sh", "shell", "console"} & set(languages)
    text = page.read_text()
    markers = len(re.findall(r"<!-- not run:", text))
    assert markers == sum(found["reason"] is not None for found in _BLOCK.finditer(text)), "a marker without its block"


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=name_of)
def test_commands_of_the_page_exist(page):
    # a command of another commit is not one of this
    code = [block.code for block in blocks(page, "bash") if "# of commit" not in block.code]
    code += [" ".join(span.split()) for span in _INLINE.findall(page.read_text())]
    for words in (words for part in code for words in commands(part)):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= make_targets(), words
        script, arguments = script_of(words)
        if script is None:
            continue
        assert script in SUBCOMMANDS or (ROOT / script).is_file(), words
        used = {word.split("=")[0] for word in arguments if re.match(r"--?[a-zA-Z]", word)}
        if used and (script.endswith(".py") or script in SUBCOMMANDS):
            first = next(place for place, word in enumerate(arguments) if word.startswith("-"))
            known = options_of(script, tuple(arguments[:first]))
            assert used <= known, f"{script} knows no {sorted(used - known)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_unmarked_commands_are_those_of_the_worked_examples(page):
    runs_here = any(name_of(page) in pages for pages in WORKED_EXAMPLES)
    for block in blocks(page, "bash"):
        for words in commands(block.code):
            if block.reason is None and words[0] != "make":
                is_script = words[0] in ("python", "moma") and script_of(words)[0] is not None
                assert runs_here and (is_script or words[0] in SHELL), (
                    f"line {block.line}: no test runs {' '.join(words)!r}; mark the block with its reason not to run"
                )


def noise(rng: np.random.Generator, side: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def write_emoji(folder: Path):
    """A data set with the columns of data/emoji: six images to train on, eight in each split that is held out."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    text = Value("string")
    features = Features(image=ImageFeature(), style=text, label=text, keywords=List(text), group=text, subgroup=text)
    for split, rows in (("train", 6), ("validation", 8), ("test", 8)):
        images = [noise(rng, 64) for _ in range(rows)]
        columns = {
            "style": ["noto", "twemoji"] * (rows // 2),
            "label": ["red apple", "castle"] * (rows // 2),
            "keywords": [["fruit"]] * rows,
            "group": ["food & drink"] * rows,
            "subgroup": ["fruit"] * rows,
        }
        Dataset.from_dict({"image": images, **columns}, features=features).to_parquet(folder / f"{split}.parquet")


def write_own_data(folder: Path):
    """What docs/how-to/own-data.md begins with: photos with captions, pages, chats and notes."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    names = [f"DSC_{number:04d}.jpg" for number in range(24)]
    for name in names:
        noise(rng, 48).save(folder / "photos" / name)
    lines = ["file_name,caption", *(f'{name},"a beach at dusk, {name}"' for name in names)]
    (folder / "photos" / "metadata.csv").write_text("\n".join(lines) + "\n")
    # what docs/how-to/label.md names
    (folder / "icons").mkdir()
    noise(rng, 48).save(folder / "icons" / "bell.png")
    (folder / "my-icons").mkdir()
    for name in ("bell", "castle"):
        noise(rng, 48).save(folder / "my-icons" / f"{name}.png")
    named = ["file_name,name,tags", 'bell.png,bell,"alarm, ring"', "castle.png,castle,"]
    (folder / "my-icons" / "metadata.csv").write_text("\n".join(named) + "\n")
    (folder / "images").mkdir()
    noise(rng, 48).save(folder / "images" / "bowl.jpg")
    # the very lines that the page shows
    shown = [line for line in (DOCS / "how-to" / "own-data.md").read_text().splitlines() if line.startswith('{"')]
    pages, chats = ([line for line in shown if key in json.loads(line)] for key in ("segments", "messages"))
    assert pages and chats
    (folder / "pages.jsonl").write_text("\n".join(pages * 2) + "\n")
    (folder / "chats.jsonl").write_text("\n".join(chats * 2) + "\n")
    # what docs/how-to/audio.md names
    for index in range(12):
        (folder / f"word{index}.wav").write_bytes(as_file(tone(300 + 100 * index, 0.2)))
    shutil.copyfile(folder / "word0.wav", folder / "word.wav")
    sounds = [{"audio": f"word{index}.wav", "word": f"word {index}"} for index in range(12)]
    (folder / "speech.jsonl").write_text("\n".join(map(json.dumps, sounds)) + "\n")
    (folder / "notes.txt").write_text("Dear diary, it rained.\nDear diary, it still rains.\n" * 2)


def write_recipes(page: Path, folder: Path):
    """The recipes that a page shows whole, each under the name that it begins with."""
    for block in blocks(page, "yaml"):
        found = re.match(r"# ([\w-]+\.yaml)\n", block.code)
        if found:
            (folder / found[1]).write_text(shrunk(block.code))


def shrink(name: str, arguments: list[str]) -> list[str]:
    """The arguments of a script, small enough for a test."""
    smaller = dict(SMALLER.get(name, {}))
    # refused where nothing is retrieved
    if name == "evaluate" and "retrieval" in arguments:
        smaller["--retrieval-pairs"] = "3"
    smaller |= {key: value for key, value in SMALLER_IF_THERE.get(name, {}).items() if key in arguments}
    arguments = list(arguments)
    for option, value in smaller.items():
        if isinstance(value, list):
            arguments += [option, *value]
        elif option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    return arguments


@pytest.mark.parametrize(
    "pages",
    [slow_if_long(pages, pages[0]) for pages in WORKED_EXAMPLES],
    ids=lambda pages: pages[0].removesuffix(".md"),
)
def test_commands_of_the_worked_example_run_one_after_the_other(pages, workplace, monkeypatch):
    (workplace / "data").unlink()
    write_emoji(workplace / "data" / "emoji")
    write_own_data(workplace)
    for page in pages:
        write_recipes(ROOT / page, workplace)
    # of the real one most of the time goes into its vocabulary
    narrow = {"vocab_size": 2100, "hidden_size": 144, "intermediate_size": 288}
    monkeypatch.setattr(make_text_model, "LlamaConfig", lambda **fields: LlamaConfig(**{**fields, **narrow}))
    # a copy: commands may write pages
    shutil.copytree(DOCS, workplace / "docs")
    code = [block.code for page in pages for block in blocks(ROOT / page, "bash") if block.reason is None]
    to_run = [words for part in code for words in commands(part) if words[0] != "make"]
    assert to_run
    for words, following in zip(to_run, [*to_run[1:], []], strict=True):
        if words[0] in SHELL:
            continue
        script, arguments = script_of(words)
        name = Path(script).stem
        # a script and a subcommand may have one name
        arguments = shrink(script if script in SMALLER else name, arguments)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        result = moma([script, *arguments]) if script in SUBCOMMANDS else importlib.import_module(name).main()
        expected = int(following[3]) if following[:3] == ["test", "$?", "="] else 0
        assert (result if isinstance(result, int) else 0) == expected, words
        # a model of no sense may write words alone
        if "--output" in arguments and "interleaved" not in arguments:
            assert Path(arguments[arguments.index("--output") + 1]).exists(), words
    for name in ("apple.png", "beach.png"):
        assert not Path(name).exists() or Image.open(name).size == (64, 64)


def test_reference_has_every_public_name_once():
    written = [
        name for page in DOCS.glob("reference/*.md") for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)
    ]
    public = [f"{package.__name__}.{name}" for package in (modeling_moma, tokenization) for name in package.__all__]
    counts = {name: written.count(name) for name in public}
    assert counts == dict.fromkeys(public, 1)


def test_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    for page in pages:
        html = page.read_text()
        fetched = re.findall(r"<(?:script|img|link)\b[^>]*\b(?:src|href)=\"?(https?:[^\" >]+)", html)
        assert not fetched, f"{page.name} fetches {fetched}"
        # fields of a docstring that its parser did not understand
        assert not re.search(r"\*optional\*|>Args:|<code>`", html), f"{page.name} shows a raw docstring"
