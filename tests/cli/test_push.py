# SPDX-License-Identifier: Apache-2.0
"""`moma push` before anything is sent: what is listed, what is refused, and why."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from helpers.tiny import tiny_model, tiny_processor
from modeling_moma.cli import push as push_to_hub
from modeling_moma.hub import upload as uploading
from modeling_moma.hub.upload import check_loads, lay_out


METADATA = {
    "license": "apache-2.0",
    "library_name": "transformers",
    "pipeline_tag": "any-to-any",
    "datasets": ["someone/emoji"],
    "tags": ["moma"],
    "model-index": [
        {
            "name": "moma-tiny",
            "results": [
                {
                    "task": {"type": "image-to-text"},
                    "dataset": {"type": "someone/emoji", "name": "Emoji"},
                    "metrics": [{"type": "accuracy", "value": 0.191, "name": "label accuracy"}],
                }
            ],
        }
    ],
}
BODY = "# A tiny model\n"


def card(body=BODY, **changes):
    metadata = {key: value for key, value in {**METADATA, **changes}.items() if value is not None}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n{body}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder that is laid out as its repository, and the two that it could be made of."""
    root, processor = tmp_path_factory.mktemp("push"), tiny_processor()
    model = tiny_model(processor)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "processor")
    (root / "model" / "README.md").write_text(card())
    shutil.copytree(root / "processor", root / "whole")
    shutil.copytree(root / "model", root / "whole", dirs_exist_ok=True)
    return root


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole / "whole", tmp_path / "model"))


@pytest.fixture
def laid_out(tmp_path_factory):
    """Lay a repository out; return its files by their names, and what is left out."""

    def laid_out(*arguments, **settings):
        place = tmp_path_factory.mktemp("repository")
        left_out = lay_out(place, *arguments, **settings)
        return {str(path.relative_to(place)): path for path in place.rglob("*") if path.is_file()}, left_out

    return laid_out


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def dry_run(folder, *arguments):
    return push_to_hub.main(["--model", str(folder), "--repo-id", "someone/moma-tiny", "--dry-run", *arguments])


def edit(path: Path, change):
    """Changes a JSON file in place; `change` gets its content."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_whole_folder_is_taken_as_it_is(whole, laid_out):
    files, left_out = laid_out(whole / "whole")
    assert files.keys() == names_in(whole / "whole") and not left_out


@pytest.mark.parametrize("processor", ["processor", "whole"])
def test_model_and_processor_become_one_repository(whole, laid_out, processor):
    files, _ = laid_out(whole / "model", whole / processor)
    assert files.keys() == names_in(whole / "whole")
    assert files["vq_model/model.safetensors"].resolve().parent.parent == whole / processor
    assert files["config.json"].resolve().parent == whole / "model"


def test_a_folder_that_is_not_empty_is_refused(folder, capsys):
    assert push_to_hub.main(["--model", str(folder), "--output", str(folder)]) == 2
    assert "has files in it already" in capsys.readouterr().err


def test_a_folder_is_written_as_the_repository_without_links(folder, tmp_path):
    assert push_to_hub.main(["--model", str(folder), "--output", str(tmp_path / "new")]) == 0
    assert names_in(tmp_path / "new") == names_in(folder)
    assert not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))


# path -> what of it is listed
LEFT = {
    "training_args.bin": "training_args.bin",
    "trainer_state.json": "trainer_state.json",
    "run.json": "run.json",
    "zero_to_fp32.py": "zero_to_fp32.py",
    ".hidden": ".hidden",
    ".env": ".env",
    "checkpoint-5/model.safetensors": "checkpoint-5",
    "global_step5/zero.safetensors": "global_step5",
    "pytorch_model_fsdp_0/__0_0.distcp": "pytorch_model_fsdp_0",
    "optimizer.safetensors": "optimizer.safetensors",
    "optimizer_0/shard.json": "optimizer_0",
    "scheduler.json": "scheduler.json",
    "vq_model/optimizer.safetensors": "vq_model/optimizer.safetensors",
    "runs/now.txt": "runs",
    "logs/now.txt": "logs",
    "wandb/config.json": "wandb",
    "cache/notes.txt": "cache",
    "hf_token.txt": "hf_token.txt",
    "client_secret.json": "client_secret.json",
    "Credentials.json": "Credentials.json",
    **{
        name: name
        for name in (
            "last.ckpt",
            "events.out.tfevents.1",
            "train.log",
            "words/data-0.arrow",
            "shards/__0_0.distcp",
            "latest",
            "token",
            "my.env",
            "id_rsa",
        )
    },
}


@pytest.mark.parametrize("name", LEFT)
def test_what_training_left_stays_here(folder, laid_out, name):
    expected = names_in(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    files, left_out = laid_out(folder)
    assert left_out == [LEFT[name]]
    assert files.keys() == expected


def test_a_link_to_a_file_is_the_file_and_one_to_a_folder_stays_here(folder, laid_out):
    expected = names_in(folder)
    # as in the Hub's cache
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    (folder / "loop").symlink_to(".")
    (folder / "lost.svg").symlink_to("nowhere.svg")
    files, left_out = laid_out(folder)
    assert files.keys() == expected
    assert left_out == ["loop", "lost.svg"]


@pytest.mark.parametrize("without", ["model", "processor", "both"])
def test_code_that_one_of_the_two_lacks_is_that_of_the_installed_package(whole, laid_out, tmp_path, without):
    for name in ("model", "processor"):
        shutil.copytree(whole / name, tmp_path / name)
        if without in (name, "both"):
            for file in (tmp_path / name).rglob("*.py"):
                file.unlink()
            # of the user's own
            (tmp_path / name / "train.py").write_text("import torch\n")
    files, _ = laid_out(tmp_path / "model", tmp_path / "processor")
    expected, _ = laid_out(whole / "whole")
    assert files.keys() - {"train.py"} == expected.keys()
    code = [name for name in expected if name.endswith(".py")]
    assert [name for name in code if files[name].read_bytes() != expected[name].read_bytes()] == []
    if without == "model":
        (tmp_path / "processor" / "processing_moma.py").write_text("x = 1\n")
        with pytest.raises(ValueError, match="processing_moma.py are of two versions of the code"):
            laid_out(tmp_path / "model", tmp_path / "processor")


def test_code_of_two_versions_is_refused(whole, laid_out, tmp_path):
    processor = shutil.copytree(whole / "whole", tmp_path / "processor")
    with (processor / "processing_moma.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(ValueError, match="processing_moma.py are of two versions of the code"):
        laid_out(whole / "whole", processor)


def drop_auto(name):
    return lambda folder: edit(folder / "config.json", lambda config: config["auto_map"].pop(name))


def set_config(**fields):
    return lambda folder: edit(folder / "config.json", lambda config: config.update(fields))


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def lose(name):
    return lambda folder: (folder / name).unlink()


def change_tensors(name, change):
    """Damage to a file of tensors; `change` gets them all."""

    def damage(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return damage


def take_out(tensors):
    del tensors[next(name for name in tensors if name.startswith("quantize."))]


def take_norm_out(tensors):
    del tensors["model.norm.weight"]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BROKEN_FILES = {
    "no configuration": (lose("config.json"), "would not load: "),
    "no weights": (lose("model.safetensors"), "would not load: "),
    "no image tokenizer": (lose("vq_model/model.safetensors"), "would not load: "),
    "no processor": (lose("processor_config.json"), "would not load: "),
    "lost code": (lose("token_groups_moma.py"), "token_groups_moma"),
    "no AutoConfig": (drop_auto("AutoConfig"), "would not load: "),
    "no Python": (write("routing_moma.py", "def broken(:\n"), "SyntaxError"),
    "the package's": (write("routing_moma.py", "import modeling_moma\n"), "modeling_moma"),
    "cut weights": (cut("model.safetensors", 5000), "SafetensorError"),
    "pointer": (write("model.safetensors", POINTER), "a pointer of Git LFS"),
    "no codebook": (change_tensors("vq_model/model.safetensors", take_out), "'quantize."),
    "no norm": (change_tensors("model.safetensors", take_norm_out), "1 missing_keys, such as 'model.norm.weight'"),
    "more layers": (set_config(num_hidden_layers=3), "missing_keys, such as 'model.layers.2."),
    "fewer layers": (set_config(num_hidden_layers=1), "22 unexpected_keys, such as 'model.layers.1."),
    "more rows": (set_config(vocab_size=6000), "would not load: RuntimeError"),
}


@pytest.mark.parametrize("damage, message", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_folder_that_would_not_load_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError) as refused:
        check_loads(folder)
    assert message in str(refused.value)


def test_the_processor_of_another_model_is_refused(folder, capsys):
    set_config(begin_image_token_id=7)(folder)
    assert dry_run(folder) == 2
    assert "`--model` has begin_image_token_id = 7, the processor's is" in capsys.readouterr().err


BROKEN_CARDS = {
    "license": (card(license=None), "README.md has no license"),
    "no head": (BODY, "README.md has no license"),
    "no YAML": ("---\nlicense: [\n---\n", "the metadata cannot be read"),
    "no results": (card(**{"model-index": [{"name": "x"}]}), "the metadata cannot be read"),
}


@pytest.mark.parametrize("text, message", BROKEN_CARDS.values(), ids=BROKEN_CARDS)
def test_a_card_that_would_mislead_is_refused(folder, laid_out, text, message):
    (folder / "README.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        laid_out(folder)


def test_a_model_without_a_card_is_refused(folder, laid_out):
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match="README.md is missing: write a model card"):
        laid_out(folder)


def test_weights_of_two_saves_are_refused(folder, laid_out):
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="one is of an older save"):
        laid_out(folder)


def test_a_local_data_set_needs_its_id_on_the_hub(folder, laid_out):
    (folder.parent / "data" / "emoji").mkdir(parents=True)
    text = card("see [data](../../data/emoji/README.md)", datasets=["data/emoji"])
    text = text.replace("type: someone/emoji", "type: data/emoji")
    (folder / "README.md").write_text(text)
    with pytest.raises(ValueError, match="'data/emoji' is a path of .*--dataset data/emoji=USER/NAME"):
        laid_out(folder)
    files, _ = laid_out(folder, datasets={"data/emoji": "someone/emoji"})
    content = files["README.md"].read_text()
    assert yaml.safe_load(content.split("---")[1]) == METADATA
    assert content.endswith("see [data](https://huggingface.co/datasets/someone/emoji)")
    # the folder keeps its card
    assert (folder / "README.md").read_text() == text


def test_an_id_on_the_hub_may_be_that_of_a_local_folder_too(folder, laid_out):
    (folder.parent / "someone" / "emoji").mkdir(parents=True)
    with pytest.raises(ValueError, match="'someone/emoji' is a path of this machine"):
        laid_out(folder)
    files, _ = laid_out(folder, datasets={"someone/emoji": "someone/emoji"})
    assert yaml.safe_load(files["README.md"].read_text().split("---")[1]) == METADATA


def test_a_data_set_that_the_card_does_not_name_cannot_be_mapped(folder, laid_out):
    with pytest.raises(ValueError, match="maps 'data/emojis', but the card names .'someone/emoji'"):
        laid_out(folder, datasets={"data/emojis": "someone/emoji"})
    with pytest.raises(ValueError, match="'a/b/c' is no id of the Hub"):
        laid_out(folder, datasets={"someone/emoji": "a/b/c"})


def test_a_card_without_mapped_data_sets_keeps_its_very_text(folder, laid_out):
    assert laid_out(folder)[0]["README.md"].read_text() == card()


def test_a_refusal_is_an_exit_code_and_a_message(folder, capsys):
    (folder / "tokenizer.json").unlink()
    assert dry_run(folder) == 2
    assert "refused, nothing was sent: the repository would not load" in capsys.readouterr().err
    assert dry_run(folder / "nowhere") == 2
    assert "nowhere', which is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["not a repo", "", "a/b/c"])
def test_a_name_that_no_repository_can_have_is_refused_by_a_dry_run_too(folder, capsys, name):
    assert push_to_hub.main(["--model", str(folder), "--repo-id", name, "--dry-run"]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"moma push: refused, nothing was sent: {name!r} is no id of the Hub: Repo id")
    assert not printed.out


def test_defect_keeps_its_traceback(folder, monkeypatch):
    def fail(*args):
        raise ValueError("none of the arguments did this")

    monkeypatch.setattr(uploading, "lay_out", fail)
    with pytest.raises(ValueError, match="none of the arguments"):
        dry_run(folder)
