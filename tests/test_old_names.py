# SPDX-License-Identifier: Apache-2.0
"""Names that said picture: recipes, flags and Python have them for one release, and folders go on as they were."""

import dataclasses
import json

import pytest
import torch
import yaml
from datasets import Dataset

import benchmarks.__main__ as benchmarks
import contact_sheet
import quickstart
from benchmarks import data_pipeline
from benchmarks.speed.cases import CASES
from helpers.released import RELEASED
from helpers.tiny import noise_images, tiny_processor
from modeling_moma.cli.train_image_tokenizer import parse_arguments
from modeling_moma.data.jobs import Job, plan_job, read_job, write_job
from modeling_moma.data.sources import read_sources
from modeling_moma.evaluation.held_out import CaptionedImages
from modeling_moma.training.image_sources import image_fields
from modeling_moma.training.recipe import read_recipe


@pytest.fixture
def source(tmp_path):
    rows = [{"image": image, "text": f"thing {index}"} for index, image in enumerate(noise_images(6))]
    Dataset.from_list(rows).to_parquet(tmp_path / "photos.parquet")
    return {"data": str(tmp_path / "photos.parquet"), "image": "image", "text": "text"}


@pytest.fixture
def recipe(tmp_path, source):
    def write(**content):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"sources": {"photos": source}, **content}))
        return str(path)

    return write


def test_old_keys_of_a_recipe_warn_and_mean_the_new_ones(recipe, source):
    path = recipe(sources={"photos": {**source, "picture_first": 0.25}}, samples={"pictures": 7})
    with pytest.warns(FutureWarning) as warned:
        found = read_recipe(path)
    assert (found.sources[0].kind.image_first, found.samples.images) == (0.25, 7)
    said = [str(warning.message) for warning in warned]
    assert any("'picture_first' is 'image_first' now" in text for text in said)
    assert any("'pictures' is 'images' now" in text for text in said)


def test_old_setting_and_old_flag_of_the_image_tokenizer_warn(recipe, tmp_path):
    path = recipe(image_tokenizer={"held_out_pictures": 5})
    with pytest.warns(FutureWarning, match="image_tokenizer: 'held_out_pictures' is 'held_out_images' now"):
        assert parse_arguments([path, "--output", str(tmp_path / "out")]).held_out_images == 5
    with pytest.warns(FutureWarning, match="--held-out-pictures is --held-out-images now"):
        args = parse_arguments([recipe(), "--output", str(tmp_path / "out"), "--held-out-pictures", "4"])
    assert args.held_out_images == 4


def test_a_recipe_of_new_names_warns_nobody(recipe, source, recwarn):
    read_recipe(recipe(sources={"photos": {**source, "image_first": 0.25}}, samples={"images": 7}))
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_a_folder_of_tokens_of_the_release_before_goes_on_without_a_warning(source, tmp_path, recwarn):
    tiny_processor().save_pretrained(tmp_path / "processor")
    sources = read_sources({"photos": {**source, "image_first": 0.25}})
    job = plan_job(sources, str(tmp_path / "processor"), 64, True, seed=0)
    # as that release wrote it
    assert job.sources["photos"]["picture_first"] == 0.25 and "image_first" not in job.sources["photos"]
    path = write_job(tmp_path / "tokens", job)
    assert "pictures" in json.loads(path.read_text())["splits"]["photos"]["train"]
    found = read_job(tmp_path / "tokens")
    assert isinstance(found, Job) and found.source("photos") == sources[0]
    assert write_job(tmp_path / "tokens", dataclasses.replace(found)) == path
    assert "picture_first" not in image_fields(sources[0])
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_old_names_in_python_warn_and_make_the_new_ones():
    from modeling_moma.convert.report import Receipt
    from modeling_moma.data.images import read_picture
    from modeling_moma.evaluation.held_out import CaptionedPictures

    codes = torch.zeros(2, 4, dtype=torch.long)
    with pytest.warns(FutureWarning, match="`CaptionedPictures` is `CaptionedImages` now"):
        found = CaptionedPictures(codes, ["a", "b"])
    assert isinstance(found, CaptionedImages) and found.images is None
    (image,) = noise_images(1)
    with pytest.warns(FutureWarning, match="`read_picture` is `read_image` now"):
        assert read_picture(image)[0].size == image.size
    receipt = Receipt("folder", "llama", image_loss=2.0)
    assert "image_loss" in dataclasses.asdict(receipt) and "picture_loss" not in dataclasses.asdict(receipt)
    with pytest.warns(FutureWarning, match="`picture_loss` is `image_loss` now"):
        assert receipt.picture_loss == 2.0


def test_the_old_name_of_a_case_of_the_benchmarks_warns_and_means_the_new_one():
    with pytest.warns(FutureWarning, match="case 'train-4t4i-pictures' is 'train-4t4i-images' now"):
        args = benchmarks.parse_arguments(["decode-4t4i", "train-4t4i-pictures"])
    assert args.cases == ["decode-4t4i", "train-4t4i-images"] and set(args.cases) <= set(CASES)


@pytest.mark.parametrize(
    "program, others",
    [
        (quickstart, []),
        (contact_sheet, ["--model", str(RELEASED), "--output", "o.png"]),
        (data_pipeline, ["scaling", "--processor", str(RELEASED)]),
    ],
)
def test_the_old_flag_of_scripts_warns_and_means_the_new_one(program, others):
    with pytest.warns(FutureWarning, match="--pictures is --images now"):
        assert program.parse_arguments([*others, "--pictures", "3"]).images == 3
    assert program.parse_arguments([*others, "--images", "3"]).images == 3
