# SPDX-License-Identifier: Apache-2.0
"""The real client of the Hub against a small server: what is pushed loads elsewhere, at every revision."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from helpers.absent import WITHOUT_PACKAGES
from helpers.hub_server import HubServer, run_client
from helpers.released import RELEASED, released_repository, skip_without_released_model
from helpers.slow import slow
from helpers.tiny import CARD, tiny_model
from modeling_moma.compat_moma import complete_model_card
from modeling_moma.hub.upload import check_loads, lay_out


ROOT = Path(__file__).resolve().parent.parent
REPOSITORY, PLAIN = "someone/moma-tiny", "someone/moma-plain"
AUTO_MAP = {
    "AutoConfig": "configuration_moma.MomaConfig",
    "AutoModel": "modeling_moma.MomaModel",
    "AutoModelForCausalLM": "modeling_moma.MomaForCausalLM",
    "AutoModelForImageTextToText": "modeling_moma.MomaForCausalLM",
    "AutoModelForMultimodalLM": "modeling_moma.MomaForCausalLM",
}

PLAIN_PUSH = """
import sys
import modeling_moma
from transformers import AutoModelForCausalLM, AutoProcessor

folder, name = sys.argv[1:]
model, processor = AutoModelForCausalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
model.push_to_hub(name)
processor.push_to_hub(name)
model.config.push_to_hub(name + "-config")
"""

STRANGER = """
import importlib
import json

absent = []
for name in ("modeling_moma", "tokenization"):
    try:
        importlib.import_module(name)
    except ImportError:
        absent.append(name)

import torch
import transformers
from PIL import Image

image, output, targets = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
image = Image.open(image)
results = {"absent": absent}
for key, (repository, revision) in targets.items():
    there = {"trust_remote_code": True, "revision": revision}
    processor = transformers.AutoProcessor.from_pretrained(repository, **there)
    model = transformers.AutoModelForCausalLM.from_pretrained(repository, **there)
    inputs = processor(images=[image], text=["<image>red"], return_tensors="pt")
    with torch.no_grad():
        results[key] = {"input_ids": inputs["input_ids"], "logits": model(**inputs).logits}
    if key == "main":
        model.save_pretrained("saved")
        processor.save_pretrained("saved")
assert not {"modeling_moma", "tokenization"} & set(sys.modules)
torch.save(results, output)
"""


@pytest.fixture(scope="module")
def models(processor):
    """Four models of one shape, each with weights of its own."""
    found = {}
    for seed, name in enumerate(("first", "second", "third", "other")):
        found[name] = tiny_model(processor, num_experts={"text": 2, "image": 2}, initializer_range=0.3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in found[name].parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory, models, processor):
    root = tmp_path_factory.mktemp("saved")
    for name, model in models.items():
        model.save_pretrained(root / name)
        (root / name / "README.md").write_text(CARD)
    processor.save_pretrained(root / "processor")
    # one folder laid out as its repository, as scripts/release.py writes it
    processor.save_pretrained(root / "second")
    models["first"].save_pretrained(root / "shards", max_shard_size="40KB")
    processor.save_pretrained(root / "shards")
    (root / "shards" / "README.md").write_text(CARD)
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(root / "image.png")
    return root


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")).running() as server:
        yield server


@pytest.fixture(scope="module")
def push(server, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")

    def push(*arguments, succeeds=True, **settings):
        result = run_client(server, home, "-m", "modeling_moma", "push", *arguments, **settings)
        assert (result.returncode == 0) is succeeds, result.stdout + result.stderr
        return result

    return push


@pytest.fixture(scope="module")
def history(server, push, folders):
    """Two commits, two interrupted pushes of a third model, and a branch; commits by name."""
    store, commits, failures = server.store, {}, {}
    push("--model", folders / "first", "--processor", folders / "processor", "--repo-id", REPOSITORY)
    commits["first"] = store.resolve(REPOSITORY, "main")
    push("--model", folders / "second", "--repo-id", REPOSITORY, "--message", "the second")
    commits["second"] = store.resolve(REPOSITORY, "main")
    third = ("--model", folders / "third", "--processor", folders / "processor", "--repo-id", REPOSITORY)
    half = (folders / "third" / "model.safetensors").stat().st_size // 2
    for action, after in (("large_upload", half), ("commit", 100)):
        with server.cutting(action, after):
            failures[action] = push(*third, succeeds=False)
            assert server.is_cut
        commits[f"after {action}"] = store.resolve(REPOSITORY, "main")
    other = ("--model", folders / "other", "--processor", folders / "processor", "--repo-id", REPOSITORY)
    push(*other, "--revision", "experiments/other")
    commits["other"] = store.resolve(REPOSITORY, "experiments/other")
    return commits, failures, store.log(REPOSITORY)


@pytest.fixture(scope="module")
def plain(server, folders, tmp_path_factory):
    """The same model by the methods of Transformers."""
    home = tmp_path_factory.mktemp("home")
    result = run_client(server, home, "-c", PLAIN_PUSH, folders / "second", PLAIN, folder=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def stranger(server, history, plain, folders, tmp_path_factory):
    """What somebody without the packages and without a token finds on the Hub."""
    home = tmp_path_factory.mktemp("stranger")
    targets = {
        "main": (REPOSITORY, "main"),
        "first": (REPOSITORY, history[0]["first"]),
        "other": (REPOSITORY, "experiments/other"),
        "plain": (PLAIN, None),
    }
    arguments = (folders / "image.png", home / "results.pt", json.dumps(targets))
    code = WITHOUT_PACKAGES + STRANGER
    result = run_client(server, home / "home", "-P", "-c", code, *arguments, token=None, folder=home)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(home / "results.pt") | {"saved": home / "saved"}


def assert_near(found, expected, tolerance=1e-5):
    # weights mapped from a file lie elsewhere in memory, and products round differently
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def expected_logits(model, processor, folders):
    inputs = processor(images=[Image.open(folders / "image.png")], text=["<image>red"], return_tensors="pt")
    with torch.no_grad():
        return inputs["input_ids"], model(**inputs).logits


@pytest.mark.parametrize(
    "target, model", [("main", "second"), ("first", "first"), ("other", "other"), ("plain", "second")]
)
def test_every_revision_gives_its_model_and_processor_without_the_packages(
    stranger, models, processor, folders, target, model
):
    assert stranger["absent"] == ["modeling_moma", "tokenization"]
    ids, logits = expected_logits(models[model], processor, folders)
    assert torch.equal(stranger[target]["input_ids"], ids)
    assert_near(stranger[target]["logits"], logits)


def test_what_is_saved_without_the_packages_can_be_pushed_again(stranger, tmp_path):
    (stranger["saved"] / "README.md").write_text(CARD)
    lay_out(tmp_path, stranger["saved"])
    check_loads(tmp_path)


@pytest.mark.parametrize("action", ["large_upload", "commit"])
def test_an_interrupted_push_changes_nothing_and_says_so(history, action):
    commits, failures, log = history
    assert log == ["the second", "Upload model and processor", "initial commit"]
    assert commits[f"after {action}"] == commits["second"]
    failure = failures[action]
    assert failure.returncode == 1
    assert f"The upload to {REPOSITORY} failed" in failure.stderr and "push again" in failure.stderr


def test_the_next_push_after_an_interruption_succeeds(server, history, stranger, push, folders):
    push("--model", folders / "third", "--processor", folders / "processor", "--repo-id", REPOSITORY)
    assert_same_files(server.store, REPOSITORY, folders / "third", folders / "processor")
    # what was pushed before is still there under its name
    assert server.store.files(REPOSITORY, history[0]["second"]) != server.store.files(REPOSITORY)


def assert_same_files(store, name, *sources, but=()):
    """Every file on the server is that of a folder, and none is missing."""
    found = {path: store.blob(entry["sha256"]).read_bytes() for path, entry in store.files(name).items()}
    expected = {}
    for folder in sources:
        expected |= {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found.keys() - {".gitattributes"} == expected.keys()
    assert [path for path in expected if found[path] != expected[path] and path not in but] == []


def test_plain_pushes_give_a_complete_repository(server, plain, tmp_path):
    for name, entry in server.store.files(PLAIN).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(server.store.blob(entry["sha256"]), tmp_path / name)
    check_loads(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_moma.MomaProcessor"}
    image_processor = processor["image_processor"]["auto_map"]
    assert image_processor["AutoImageProcessor"] == "image_processing_moma.MomaImageProcessor"
    # in two commits, with a card that its author has to complete, as docs/how-to/push.md says
    assert len(server.store.log(PLAIN)) == 3
    metadata = ModelCard((tmp_path / "README.md").read_text()).data
    assert (metadata.library_name, metadata.pipeline_tag, metadata.license) == ("transformers", "any-to-any", None)
    assert {"moma", "mixture-of-experts"} <= set(metadata.tags)


def test_a_plain_push_leaves_what_a_card_says(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\npipeline_tag: image-to-text\ntags:\n- mine\n---\nMine.\n")
    complete_model_card(card)
    data = ModelCard.load(card).data
    assert (data.license, data.pipeline_tag, data.library_name) == ("mit", "image-to-text", "transformers")
    assert data.tags[0] == "mine" and "moma" in data.tags and card.read_text().endswith("Mine.\n")


def test_a_plain_push_of_the_configuration_carries_its_code(server, plain):
    files = server.store.files(f"{PLAIN}-config")
    config = json.loads(server.store.blob(files["config.json"]["sha256"]).read_text())
    assert config["auto_map"] == AUTO_MAP
    assert {"configuration_moma.py", "compat_moma.py"} <= files.keys()


def test_weights_of_an_older_layout_and_files_of_an_older_processor_do_not_stay(server, push, folders, tmp_path):
    name = "someone/moma-shards"
    older = ("additional_chat_templates/short.jinja", "added_tokens.json", "vq_model/old.json")
    folder = shutil.copytree(folders / "second", tmp_path / "older")
    for path in (*older, "notes.md"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("{}")
    push("--model", folder, "--repo-id", name)
    assert_same_files(server.store, name, folder)
    push("--model", folders / "shards", "--repo-id", name)
    # a loader would prefer it to the shards
    assert not {"model.safetensors", *older} & server.store.files(name).keys()
    # nothing loads it, so it is not ours to remove
    (tmp_path / "stays").mkdir()
    (tmp_path / "stays" / "notes.md").write_text("{}")
    assert_same_files(server.store, name, folders / "shards", tmp_path / "stays")


@slow
def test_a_push_to_an_impossible_branch_commits_nothing(server, push, folders):
    name = "someone/moma-branch"
    result = push("--model", folders / "second", "--repo-id", name, "--revision", "no..branch", succeeds=False)
    assert "The upload to" in result.stderr
    assert server.store.log(name) == ["initial commit"]


@slow
def test_a_private_push_to_a_public_repository_is_refused(server, push, folders):
    name = "someone/moma-public"
    server.store.create(name, private=False)
    result = push("--model", folders / "second", "--repo-id", name, "--private", succeeds=False)
    assert "is public already" in result.stderr
    assert server.store.log(name) == ["initial commit"]


def test_a_dry_run_lists_files_and_sends_nothing(server, push, folders, tmp_path):
    before = len(server.requests)
    folder = shutil.copytree(folders / "second", tmp_path / "second")
    (folder / "training_args.bin").write_bytes(b"x")
    result = push("--model", folder, "--repo-id", "someone/moma-dry", "--dry-run")
    assert "vq_model/model.safetensors" in result.stdout
    assert "left out  training_args.bin" in result.stdout
    assert "for main of someone/moma-dry" in result.stdout
    assert len(server.requests) == before


def test_a_push_without_a_token_sends_nothing(server, push, folders):
    name = "someone/moma-nobody"
    result = push("--model", folders / "second", "--repo-id", name, token=None, succeeds=False)
    assert "hf auth login" in result.stderr
    assert name.replace("/", "--") not in {path.name for path in (server.store.folder / "repositories").iterdir()}


@slow
def test_the_released_model_can_be_pushed_with_the_installed_code(server, push, tmp_path):
    skip_without_released_model()
    arguments = ("--model", RELEASED, "--dataset", "data/emoji=someone/emoji")
    push(*arguments, "--repo-id", "someone/moma-emoji", "--private")
    store = server.store
    assert store.is_private("someone/moma-emoji")
    assert_same_files(store, "someone/moma-emoji", released_repository(tmp_path / "repository"))
    card = store.blob(store.files("someone/moma-emoji")["README.md"]["sha256"]).read_text()
    assert "datasets:\n- someone/emoji\n" in card and "data/emoji/README.md" not in card
