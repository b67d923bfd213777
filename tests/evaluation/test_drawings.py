# SPDX-License-Identifier: Apache-2.0
"""Drawings against real images, with references on equal numbers."""

import pytest
import torch

from helpers.tiny import tiny_model, tiny_vq_model
from modeling_moma.evaluation.drawings import compare_features, feature_extractor, frechet_distance, measure_drawings
from modeling_moma.evaluation.held_out import CaptionedImages
from modeling_moma.evaluation.measures import decode_images, draw_images
from tokenization import MomaProcessor


SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0}


def mean_colours(images):
    """Colours of the four quarters stand for features."""
    return torch.nn.functional.avg_pool2d(images, 8).flatten(1)


@pytest.fixture(scope="module")
def parts(processor):
    codes = torch.randint(0, 32, (11, 16), generator=torch.Generator().manual_seed(0))
    # `<image>` in a caption is what it is, not a place for an image
    captions = ["noto: red apple", "castle <image>", "fruit"] * 3 + ["red", "green"]
    return tiny_model(processor), processor, CaptionedImages(codes, captions)


def measure(model, processor, rows, seed=0):
    return measure_drawings(model, processor, rows, mean_colours, 4, SAMPLING, seed)


def test_drawings_are_compared_with_reconstructions_where_there_are_no_pixels(parts):
    model, processor, rows = parts
    found = measure(model, processor, rows)
    assert (found["images"], found["real"], found["sampling"]) == (11, "reconstructions", SAMPLING)
    assert {name: part["images"] for name, part in found["comparisons"].items()} == {
        "drawn": 11,
        "drawn, halves": 5,
        "real, halves": 5,
    }
    drawn = draw_images(model, processor, rows.captions, 4, SAMPLING, 0)
    drawn, real = (mean_colours(torch.cat(list(decode_images(processor, codes, 4)))) for codes in (drawn, rows.codes))
    assert found["comparisons"]["drawn"] == compare_features(real, drawn)
    assert found == measure(model, processor, rows) != measure(model, processor, rows, seed=1)


def test_real_images_have_a_row_for_what_the_codes_keep_of_them(parts):
    model, processor, rows = parts
    real = torch.rand(11, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    # read once, as a stream of batches is
    found = measure(model, processor, CaptionedImages(rows.codes, rows.captions, iter(real.split(3))))
    assert found["real"] == "images"
    reconstructed = mean_colours(torch.cat(list(decode_images(processor, rows.codes, 4))))
    comparisons = found["comparisons"]
    assert comparisons["reconstructed"]["frechet_distance"] == frechet_distance(mean_colours(real), reconstructed)
    assert list(comparisons) == ["drawn", "reconstructed", "drawn, halves", "real, halves"]
    with pytest.raises(ValueError, match="10 images, but `codes` 11"):
        measure(model, processor, CaptionedImages(rows.codes, rows.captions, real[:10].split(3)))


def test_the_judge_has_its_features_of_images_of_any_size():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `train` is not installed")
    extract = feature_extractor("cpu")
    assert extract(torch.zeros(2, 3, 16, 16)).shape == (2, 1280)


def test_too_few_images_and_a_tokenizer_that_shows_none_are_refused(parts):
    model, processor, rows = parts
    with pytest.raises(ValueError, match="7 images to compare with, but at least 8"):
        measure(model, processor, CaptionedImages(rows.codes[:7], rows.captions[:7]))
    vq_model = tiny_vq_model()
    vq_model.config.use_decoder = False
    reader = MomaProcessor(processor.image_processor, processor.tokenizer, vq_model)
    with pytest.raises(ValueError, match="no decoder"):
        measure(model, reader, rows)
