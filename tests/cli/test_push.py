# SPDX-License-Identifier: Apache-2.0
"""`moma push` before anything is sent: what is listed, what is refused, and why."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from helpers.sounds import THREE, processor_of_sounds
from helpers.tiny import tiny_model, tiny_processor
from modeling_moma.cli import push as push_to_hub
from modeling_moma.evaluation.measures import EXPERT_CHOICE
from modeling_moma.hub import upload as uploading
from modeling_moma.hub.card import check_dataset, measured_numbers, with_datasets
from modeling_moma.hub.upload import prepare


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
                    "metrics": [{"type": "accuracy", "name": "label accuracy", "value": 0.191}],
                }
            ],
        }
    ],
}
REPORT = {
    "images": 581,
    "models": {"model": {"hidden_size": 256}},
    "loss": {"causal": {"text": 0.9922214, "tokens": 85300}, EXPERT_CHOICE: {"text": 0.9931336}},
    "captions": {"model": {"label": 0.19104991}, "dense": {"label": 0.1686746}},
}
BODY = "\n# A tiny model\n\n![curves](curves.png) and [the report](evaluation.json), `[no](link)`\n"


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
    (root / "model" / "evaluation.json").write_text(json.dumps(REPORT))
    (root / "model" / "curves.png").write_bytes(b"an image")
    shutil.copytree(root / "processor", root / "whole")
    shutil.copytree(root / "model", root / "whole", dirs_exist_ok=True)
    shutil.copytree(root / "whole", root / "shards")
    (root / "shards" / "model.safetensors").unlink()
    model.save_pretrained(root / "shards", max_shard_size="40KB")
    return root


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole / "whole", tmp_path / "model"))


def edit(path: Path, change):
    """Changes a JSON file in place; `change` gets its content."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(folder, **arguments) -> str:
    with pytest.raises(ValueError) as refused:
        prepare(folder, **arguments)
    return str(refused.value)


def test_a_whole_folder_is_taken_as_it_is(whole):
    upload = prepare(whole / "whole")
    files = {str(path.relative_to(whole / "whole")) for path in (whole / "whole").rglob("*") if path.is_file()}
    assert set(upload.files) == files and not upload.left_out


def test_model_and_processor_become_one_repository(whole):
    upload = prepare(whole / "model", whole / "processor")
    assert set(upload.files) == set(prepare(whole / "whole").files)
    assert upload.files["vq_model/model.safetensors"].parent.parent == whole / "processor"
    assert upload.files["config.json"].parent == whole / "model"


@pytest.mark.parametrize("name", ["two\nlines.md", os.fsdecode(b"caf\xe9.md")])
def test_a_name_that_no_repository_can_hold_stays_here(folder, name, capsys):
    (folder / name).write_text("words")
    (folder / "caf\u00e9\u200d.md").write_text("words")
    upload = prepare(folder)
    assert "caf\u00e9\u200d.md" in upload.files and name not in upload.files
    assert upload.left_out[ascii(name)] == "a name that the Hub cannot hold"
    assert push_to_hub.main(["--model", str(folder), "--repo-id", "someone/moma-tiny", "--dry-run"]) == 0
    capsys.readouterr().out.encode()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token_id": 7}, "generation_config.json: eos_token_id 7, but the processor has"),
        ({"eos_token_id": [2, 10**6]}, "eos_token_id = 1000000 is no token of the model, which has"),
        ({"pad_token_id": "x"}, "generation_config.json: "),
        ({"bos_token_id": 99999}, "bos_token_id = 99999 is no token"),
        ({"caption_suppress_tokens": [2, "tags"]}, r"caption_suppress_tokens = [2, 'tags'] is no list of tokens"),
        ({"begin_suppress_tokens": 2}, "begin_suppress_tokens = 2 is no list of tokens of the model"),
        ({"suppress_tokens": [10**6]}, "suppress_tokens = [1000000] is no list of tokens"),
        ({"max_new_tokens": -3}, "generation_config.json: Transformers cannot use it"),
    ],
)
def test_a_generation_config_of_other_tokens_is_refused(folder, fields, message):
    edit(folder / "generation_config.json", lambda content: content.update(fields))
    assert message in refusal(folder)


def test_a_generation_config_may_name_several_tokens_that_end_a_text(folder):
    eos = json.loads((folder / "config.json").read_text())["eos_token_id"]
    edit(folder / "generation_config.json", lambda content: content.update(eos_token_id=[eos, 5]))
    prepare(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", ""], "--output '': it names no folder"),
        (["--output", "new", "--private"], "--private: of the Hub"),
        (["--output", "new", "--revision", "v1"], "--revision: of the Hub"),
        (["--output", "new", "--message", "x"], "--message: of the Hub"),
        (["--output", "full", "--dry-run"], "has files in it already"),
    ],
)
def test_flags_beside_a_folder_are_refused(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "there.txt").touch()
    assert push_to_hub.main(["--model", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_folder_of_everything_gives_its_processor_only(whole):
    upload = prepare(whole / "model", whole / "whole")
    assert set(upload.files) == set(prepare(whole / "whole").files)
    assert upload.files["model.safetensors"].parent == whole / "model"


# path -> what of it is listed, and why
LEFT = {
    "training_args.bin": ("training_args.bin", "a pickle"),
    "trainer_state.json": ("trainer_state.json", "a record of the training"),
    "run.json": ("run.json", "a record of the training"),
    "zero_to_fp32.py": ("zero_to_fp32.py", "a tool of the training"),
    ".hidden": (".hidden", "hidden"),
    ".env": (".env", "hidden"),
    "checkpoint-5/model.safetensors": ("checkpoint-5", "a state of the training"),
    "global_step5/zero.safetensors": ("global_step5", "a state of the training"),
    "pytorch_model_fsdp_0/__0_0.distcp": ("pytorch_model_fsdp_0", "a state of the training"),
    "optimizer.safetensors": ("optimizer.safetensors", "a state of the training"),
    "optimizer_0/shard.json": ("optimizer_0", "a state of the training"),
    "scheduler.json": ("scheduler.json", "a state of the training"),
    "vq_model/optimizer.safetensors": ("vq_model/optimizer.safetensors", "a state of the training"),
    "runs/now.txt": ("runs", "logs of the training"),
    "logs/now.txt": ("logs", "logs of the training"),
    "wandb/config.json": ("wandb", "logs of the training"),
    "cache/notes.txt": ("cache", "a cache"),
    "hf_token.txt": ("hf_token.txt", "perhaps a secret"),
    "client_secret.json": ("client_secret.json", "perhaps a secret"),
    "Credentials.json": ("Credentials.json", "perhaps a secret"),
    **{
        name: (name, "no kind of file that a model has")
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
def test_what_training_left_stays_here(folder, name):
    expected = set(prepare(folder).files)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    upload = prepare(folder)
    listed, reason = LEFT[name]
    assert upload.left_out == {listed: reason}
    assert set(upload.files) == expected


def test_a_link_to_a_file_is_the_file_and_one_to_a_folder_stays_here(folder):
    expected = set(prepare(folder).files)
    # as in the Hub's cache
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    (folder / "loop").symlink_to(".")
    (folder / "elsewhere").symlink_to(folder.parent)
    upload = prepare(folder)
    assert set(upload.files) == expected
    assert upload.left_out == dict.fromkeys(("loop", "elsewhere"), "a link to a folder")
    (folder / "vq_model").rename(folder.parent / "vq_model")
    (folder / "vq_model").symlink_to("../vq_model")
    assert "vq_model (a link to a folder)" in refusal(folder).splitlines()[-1]


@pytest.mark.parametrize("name", ["curves.svg", "again.json"])
def test_a_link_that_leads_nowhere_is_refused(folder, name):
    (folder / "curves.svg").symlink_to("lost.svg")
    (folder / "again.json").symlink_to("again.json")
    (folder / name).rename(folder / "vq_model" / name)
    (folder / ({"curves.svg", "again.json"} - {name}).pop()).unlink()
    assert f"vq_model/{name} is a link to " in refusal(folder)


NEEDED = (
    "config.json generation_config.json processor_config.json tokenizer.json tokenizer_config.json README.md "
    "vq_model/config.json model.safetensors vq_model/model.safetensors"
).split()


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder)


@pytest.mark.parametrize("without", ["model", "processor", "both"])
def test_code_that_one_of_the_two_lacks_is_that_of_the_installed_package(whole, tmp_path, without):
    for name in ("model", "processor"):
        shutil.copytree(whole / name, tmp_path / name)
        if without in (name, "both"):
            for file in (tmp_path / name).rglob("*.py"):
                file.unlink()
            # of the user's own
            (tmp_path / name / "train.py").write_text("import torch\n")
    files = prepare(tmp_path / "model", tmp_path / "processor").files
    expected = prepare(whole / "whole").files
    assert set(files) - {"train.py"} == set(expected)
    code = [name for name in expected if name.endswith(".py")]
    assert [name for name in code if files[name].read_bytes() != expected[name].read_bytes()] == []
    if without == "model":
        (tmp_path / "processor" / "processing_moma.py").write_text("x = 1\n")
        assert "processing_moma.py of" in refusal(tmp_path / "model", processor=tmp_path / "processor")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda codec: shutil.rmtree(codec), "audio_codec/ is missing, the codec that"),
        (lambda codec: (codec / "codebook.safetensors").unlink(), "audio_codec/codebook.safetensors is missing"),
        (lambda codec: (codec / "codec_config.json").unlink(), "audio_codec/codec_config.json is missing"),
        (lambda codec: os.truncate(codec / "codebook.safetensors", 40), "no readable safetensors file"),
        (lambda codec: os.truncate(codec / "codec_config.json", 9), "codec_config.json cannot be read as JSON"),
    ],
)
def test_a_codec_that_would_not_load_is_refused(tmp_path, damage, message):
    processor = processor_of_sounds()
    tiny_model(processor, **THREE).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(card())
    (tmp_path / "evaluation.json").write_text(json.dumps(REPORT))
    (tmp_path / "curves.png").write_bytes(b"an image")
    assert "audio_codec/codebook.safetensors" in prepare(tmp_path).files
    damage(tmp_path / "audio_codec")
    assert message in refusal(tmp_path)


def test_every_file_of_code_is_needed(folder):
    code = sorted(path.name for path in folder.glob("*.py"))
    assert {"modeling_moma.py", "routing_moma.py", "processing_moma.py", "trunk_moma_vq.py"} <= set(code)
    for name in code:
        aside = (folder / name).rename(folder.parent / name)
        assert f"{name} is missing" in refusal(folder), name
        aside.rename(folder / name)


def test_all_problems_are_told_at_once(folder):
    (folder / "generation_config.json").unlink()
    (folder / "README.md").write_text(card(license=None))
    assert {line.split(" is ")[0] for line in refusal(folder).splitlines()} == {
        "generation_config.json",
        "README.md: license",
    }


def drop_auto(name):
    return lambda folder: edit(folder / "config.json", lambda config: config["auto_map"].pop(name))


def set_config(**fields):
    return lambda folder: edit(folder / "config.json", lambda config: config.update(fields))


def set_auto(reference):
    return lambda folder: edit(folder / "config.json", lambda config: config["auto_map"].update(AutoModel=reference))


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def no_image_processor(folder):
    edit(folder / "processor_config.json", lambda config: config["image_processor"].pop("auto_map"))


def change_tensors(name, change):
    """Damage to a file of tensors; `change` gets them all."""

    def damage(folder):
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return damage


def take_out(tensors):
    del tensors[next(name for name in tensors if name.startswith("quantize."))]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BROKEN_FILES = {
    "no AutoConfig": (drop_auto("AutoConfig"), "config.json: auto_map.AutoConfig is missing: saved without"),
    "no AutoModel": (drop_auto("AutoModel"), "config.json: auto_map.AutoModel is missing"),
    "no multimodal": (drop_auto("AutoModelForMultimodalLM"), "auto_map.AutoModelForMultimodalLM is missing"),
    "no image processor": (no_image_processor, "image_processor.auto_map.AutoImageProcessor is missing"),
    "no such class": (
        set_auto("modeling_moma.Moma"),
        "'modeling_moma.Moma', but modeling_moma.py has no class 'Moma'",
    ),
    "no such module": (set_auto("modeling_llama.Llama"), "'modeling_llama.Llama', but modeling_llama.py is missing"),
    "code elsewhere": (set_auto("a/b--modeling_moma.MomaModel"), "'a/b--modeling_moma.MomaModel', code of another"),
    "no Python": (write("modeling_moma.py", "def broken(:\n"), "modeling_moma.py is no Python"),
    "no Python within": (write("routing_moma.py", "def broken(:\n"), "routing_moma.py is no Python"),
    "no JSON": (cut("config.json", 100), "config.json cannot be read as JSON"),
    "no object": (write("tokenizer.json", "[]"), "tokenizer.json holds a list"),
    "cut weights": (
        cut("model.safetensors", 5000),
        "model.safetensors of 5,000 bytes is no readable safetensors file",
    ),
    "cut header": (cut("vq_model/model.safetensors", 7), "vq_model/model.safetensors of 7 bytes"),
    "pointer": (write("model.safetensors", POINTER), "model.safetensors is the pointer of a large file"),
    "two layouts": (write("model.safetensors.index.json", "{}"), "are both there: one is of an older save"),
    "no auto_map": (set_config(auto_map=["x"]), "config.json: auto_map is ['x'], not an object"),
    "no class": (set_auto(3), "config.json: auto_map.AutoModel is 3, not a class"),
    "no range": (set_config(modality_token_ranges={"image": [[1]]}), "the tokens in them cannot be compared"),
    "no frame": (set_config(modality_frames={"image": 3}), "the tokens in them cannot be compared"),
    "other ids": (set_config(begin_image_token_id=7), "begin_image_token_id 7, but the processor has"),
    "no tensors": (change_tensors("model.safetensors", dict.clear), "weights that are not there, such as "),
    "no codebook": (
        change_tensors("vq_model/model.safetensors", take_out),
        "vq_model/config.json describes a model with 1 weights that are not there, such as 'quantize.",
    ),
    "more layers": (set_config(num_hidden_layers=3), "that are not there, such as 'model.layers.2."),
    "fewer layers": (
        set_config(num_hidden_layers=1),
        "config.json describes a model without 22 of the weights that are there, such as 'model.layers.1.",
    ),
    "more rows": (set_config(vocab_size=6000), "but by the configuration it is (6000, "),
    "no model": (set_config(num_hidden_layers=-1), "config.json describes no model ("),
    "fewer codes": (set_config(image_seq_length=9), "image_seq_length 9, but the processor has"),
    "other end": (set_config(eos_token_id=7), "eos_token_id 7, but the processor has"),
    "few ids": (set_config(vocab_size=30), "vocab_size 30, but the processor has"),
    "other codes": (set_config(modality_token_ranges={"image": [[9, 19]]}), "modality_token_ranges.image holds 10"),
}


@pytest.mark.parametrize("damage, message", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_folder_that_would_not_load_is_refused(folder, damage, message):
    damage(folder)
    assert message in refusal(folder)


def test_a_weight_in_a_file_that_nobody_loads_counts_as_missing(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({"model.norm.weight": tensors.pop("model.norm.weight")}, folder / "older.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "with 1 weights that are not there, such as 'model.norm.weight'" in refusal(folder)


def test_index_without_a_map_of_shards_is_refused(whole, tmp_path):
    folder = shutil.copytree(whole / "shards", tmp_path / "shards")
    edit(folder / "model.safetensors.index.json", lambda index: index.update(weight_map=["model-1.safetensors"]))
    assert "model.safetensors.index.json has no readable weight_map" in refusal(folder)


def test_shards_are_taken_and_a_lost_or_foreign_one_is_named(whole, tmp_path):
    folder = shutil.copytree(whole / "shards", tmp_path / "shards")
    shards = sorted(name for name in prepare(folder).files if name.startswith("model-"))
    assert len(shards) > 1
    shutil.copy(folder / shards[1], folder / shards[0])
    assert f"{shards[0]} lacks" in refusal(folder)
    (folder / shards[0]).unlink()
    assert f"{shards[0]} is missing, which model.safetensors.index.json names" in refusal(folder)


def test_code_of_two_versions_is_refused(whole, tmp_path):
    processor = shutil.copytree(whole / "whole", tmp_path / "processor")
    model = shutil.copytree(whole / "whole", tmp_path / "model")
    with (processor / "processing_moma.py").open("a") as file:
        file.write("# changed\n")
    assert "processing_moma.py of `processor`" in refusal(model, processor=processor)


def metric(**fields):
    index = json.loads(json.dumps(METADATA["model-index"]))
    index[0]["results"][0]["metrics"][0].update(fields)
    return index


BROKEN_CARDS = {
    "library": (card(library_name="timm"), "library_name is 'timm', not 'transformers'"),
    "pipeline": (card(pipeline_tag="text-generation"), "pipeline_tag is 'text-generation', not 'any-to-any'"),
    "license": (card(license=None), "license is None"),
    "tags": (card(tags=None), "tags is None"),
    "no datasets": (card(datasets=None), "datasets is None"),
    "no id": (card(datasets=["my data"]), "the data set 'my data' is no id of the Hub"),
    "no head": (BODY, "README.md has no metadata"),
    "no YAML": ("---\nlicense: [\n---\n", "the metadata cannot be read"),
    "no results": (card(**{"model-index": [{"name": "x"}]}), "the metadata cannot be read"),
    "edited": (card(**{"model-index": metric(value=0.2)}), "label accuracy is 0.2, which evaluation.json does not"),
    "a baseline's": (
        card(**{"model-index": metric(value=0.1687)}),
        "is 0.1687, which evaluation.json does not measure",
    ),
    "of the oracle": (
        card(**{"model-index": metric(value=0.9931)}),
        "is 0.9931, which evaluation.json does not measure",
    ),
    "a size": (card(**{"model-index": metric(value=256)}), "is 256, which evaluation.json does not measure"),
    "text": (card(**{"model-index": metric(value="good")}), "is 'good', which is no number"),
    "lost image": (card(BODY.replace("curves", "lost")), "the link 'lost.png' leads to no file"),
    "link out": (card("[data](../../data/README.md)"), "'../../data/README.md' leads out of the folder"),
}


@pytest.mark.parametrize("text, message", BROKEN_CARDS.values(), ids=BROKEN_CARDS)
def test_a_card_that_would_mislead_is_refused(folder, text, message):
    (folder / "README.md").write_text(text)
    assert message in refusal(folder)


def test_numbers_without_a_report_are_refused(folder):
    (folder / "evaluation.json").unlink()
    (folder / "README.md").write_text(card("\n# A tiny model\n"))
    assert "model-index has 1 values, but evaluation.json is missing" in refusal(folder)
    (folder / "README.md").write_text(card("\n# A tiny model\n", **{"model-index": None}))
    prepare(folder)


def test_a_report_that_is_no_report_is_refused(folder):
    (folder / "evaluation.json").write_text("[0.191]")
    assert "evaluation.json holds a list, not an object" in refusal(folder)


def test_measured_numbers_are_those_of_the_model_under_causal_routing():
    assert measured_numbers(REPORT) == [0.9922214, 0.19104991]


def test_a_local_data_set_needs_its_id_on_the_hub(folder):
    (folder.parent / "data" / "emoji").mkdir(parents=True)
    index = metric()
    index[0]["results"][0]["dataset"]["type"] = "data/emoji"
    text = card("see [data](../data/emoji/README.md#splits)".replace("#splits", ""), datasets=["data/emoji"])
    (folder / "README.md").write_text(text.replace("type: someone/emoji", "type: data/emoji"))
    message = refusal(folder)
    assert "'data/emoji' is a path of this machine" in message and "--dataset data/emoji=USER/NAME" in message
    content = prepare(folder, datasets={"data/emoji": "someone/emoji"}).files["README.md"].decode()
    assert yaml.safe_load(content.split("---")[1]) == METADATA
    assert content.endswith("see [data](https://huggingface.co/datasets/someone/emoji)")
    # the folder keeps its card
    assert "data/emoji" in (folder / "README.md").read_text()


def test_an_id_on_the_hub_may_be_that_of_a_local_folder_too(folder):
    (folder.parent / "someone" / "emoji").mkdir(parents=True)
    assert "'someone/emoji' is a path of this machine" in refusal(folder)
    upload = prepare(folder, datasets={"someone/emoji": "someone/emoji"})
    assert yaml.safe_load(dict(upload.files)["README.md"].read_text().split("---")[1]) == METADATA


def test_a_card_that_cannot_be_read_is_told_where_data_sets_are_mapped_too(folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert "the metadata cannot be read" in refusal(folder, datasets={"data/emoji": "someone/emoji"})
    (folder / "README.md").write_bytes(b"\xff")
    assert "README.md is no text in UTF-8" in refusal(folder)


def test_a_data_set_that_the_card_does_not_name_cannot_be_mapped(folder):
    assert "maps 'data/emojis', but the card names ['someone/emoji']" in refusal(
        folder, datasets={"data/emojis": "someone/emoji"}
    )
    assert "maps 'someone/emoji' to 'a/b/c', which is no id" in refusal(folder, datasets={"someone/emoji": "a/b/c"})


def test_links_to_files_of_a_data_set_lead_to_these_files_on_the_hub():
    links = ("../../data/emoji", "../../data/emoji/LICENSES/MIT.txt", "../../data/emoji-more/README.md", "curves.png")
    text = card(" ".join(f"[link]({link})" for link in links), datasets=["data/emoji"])
    found = with_datasets(text, {"data/emoji": "someone/emoji"})
    hub = "https://huggingface.co/datasets/someone/emoji"
    expected = (hub, f"{hub}/blob/main/LICENSES/MIT.txt", *links[2:])
    assert found.endswith(" ".join(f"[link]({link})" for link in expected))


def test_a_link_in_angle_brackets_may_have_spaces(folder):
    (folder / "two curves.png").write_bytes(b"an image")
    (folder / "README.md").write_text(card(f"{BODY}![both](<two curves.png>)\n"))
    assert prepare(folder)
    (folder / "README.md").write_text(card(f"{BODY}![both](<three curves.png>)\n"))
    assert "the link 'three curves.png' leads to no file" in refusal(folder)
    text = with_datasets(card("[it](<../../data/emoji/the card.md>)", datasets=["data/emoji"]), {"data/emoji": "a/b"})
    assert text.endswith("[it](<https://huggingface.co/datasets/a/b/blob/main/the card.md>)")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--revision", ""], "--revision '': the Hub takes none that is empty"),
        (["--message", ""], "--message '': the Hub takes none that is empty"),
        (["--dataset", "data/a=x/a", "--dataset", "data/a=x/b"], "--dataset data/a=x/b: 'data/a' has the id 'x/a'"),
    ],
)
def test_what_is_empty_or_given_twice_is_refused_before_anything_is_sent(folder, arguments, message, capsys):
    assert push_to_hub.main(["--model", str(folder), "--repo-id", "a/b", "--dry-run", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_card_without_mapped_data_sets_keeps_its_very_text(folder):
    assert with_datasets(card(), {}) == card()
    assert prepare(folder).files["README.md"] == folder / "README.md"
    assert list(check_dataset("someone/emoji", folder)) == []


def test_a_refusal_is_an_exit_code_and_a_message(folder, capsys):
    (folder / "tokenizer.json").unlink()
    assert push_to_hub.main(["--model", str(folder), "--repo-id", "someone/moma-tiny"]) == 2
    assert "refused, nothing was sent: tokenizer.json is missing" in capsys.readouterr().err
    assert push_to_hub.main(["--model", str(folder / "nowhere"), "--repo-id", "someone/moma-tiny"]) == 2
    assert "nowhere', which is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["not a repo", "", "a/b/c"])
def test_a_name_that_no_repository_can_have_is_refused_by_a_dry_run_too(folder, capsys, name):
    assert push_to_hub.main(["--model", str(folder), "--repo-id", name, "--dry-run"]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"moma push: refused, nothing was sent: --repo-id: {name!r} is no id of the Hub: Repo id")
    assert not printed.out


def test_defect_keeps_its_traceback(folder, monkeypatch):
    def fail(*args):
        raise ValueError("none of the arguments did this")

    monkeypatch.setattr(uploading, "prepare", fail)
    with pytest.raises(ValueError, match="none of the arguments"):
        push_to_hub.main(["--model", str(folder), "--repo-id", "someone/moma-tiny"])
