# SPDX-License-Identifier: Apache-2.0
"""The image tokenizer as ONNX graphs, run by ONNX Runtime."""

import importlib
import platform

import numpy as np
import pytest
import torch
from datasets import load_dataset

from helpers.released import RELEASED, skip_without_released_model
from helpers.slow import slow
from helpers.tiny import noise_images, tiny_processor, tiny_vq_model
from modeling_moma.export.image_tokenizer import export_image_tokenizer
from tokenization import MomaProcessor


pytest.importorskip("onnxscript", reason="ONNX is not here: pip install onnx onnxscript onnxruntime")
ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not here: pip install onnx onnxscript onnxruntime")


def run(path, **inputs: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def assert_same_codes_and_pixels(processor, images, folder):
    files = export_image_tokenizer(processor.vq_model, folder)
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    codes = processor.vq_model.get_image_tokens(pixels)
    decoded = processor.vq_model.decode_image_tokens(codes)
    # other numbers of images than the graph was traced with
    for count in (1, len(images)):
        np.testing.assert_array_equal(run(files.encoder, pixel_values=pixels[:count].numpy()), codes[:count].numpy())
        pixels_out = run(files.decoder, image_tokens=codes[:count].numpy())
        np.testing.assert_allclose(pixels_out, decoded[:count].numpy(), atol=1e-4)
    assert codes.unique().numel() > 8
    return files, codes


def test_graphs_of_a_tiny_tokenizer_give_its_codes_and_pixels(tmp_path):
    files, codes = assert_same_codes_and_pixels(tiny_processor(), noise_images(5), tmp_path / "new" / "onnx")
    codes[0, 0] = 32
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument):
        run(files.decoder, image_tokens=codes.numpy())


# docs/how-to/export.md compares codes of the released one
@slow
def test_graphs_of_the_released_tokenizer_give_its_codes_and_pixels(tmp_path):
    skip_without_released_model()
    images = load_dataset(str(RELEASED.parents[1] / "data" / "emoji"), split="test")[:24]["image"]
    assert_same_codes_and_pixels(MomaProcessor.from_pretrained(RELEASED), images, tmp_path)


def test_a_tokenizer_without_a_decoder_has_an_encoder_alone(tmp_path):
    model = tiny_vq_model().train()
    model.decoder = None
    files = export_image_tokenizer(model, tmp_path)
    assert model.training and model.encoder.training
    assert files.decoder is None and files.encoder.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]


def test_a_second_export_leaves_no_decoder_of_the_first(tmp_path):
    (tmp_path / "decoder.onnx").write_bytes(b"of another tokenizer")
    model = tiny_vq_model()
    model.decoder = None
    export_image_tokenizer(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]


def test_an_export_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    files = {"encoder.onnx": b"old", "decoder.onnx": b"old"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    class Full:
        def save(self, path, external_data):
            path.write_bytes(b"new")
            if path.name == "decoder.onnx":
                raise OSError("No space left on device")

    module = importlib.import_module("modeling_moma.export.image_tokenizer")
    monkeypatch.setattr(module, "_program", lambda *args: Full())
    with pytest.raises(OSError, match="No space left"):
        export_image_tokenizer(tiny_vq_model(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_nothing_stays_of_an_export_that_was_killed(tmp_path, monkeypatch):
    folder = tmp_path / "onnx"
    # no process has so large a number
    killed = folder / f".onnx.{platform.node()}-{2**31 - 1}-1.partial"
    killed.mkdir(parents=True)

    class Program:
        def save(self, path, external_data):
            path.write_bytes(b"new")

    module = importlib.import_module("modeling_moma.export.image_tokenizer")
    monkeypatch.setattr(module, "_program", lambda *args: Program())
    files = export_image_tokenizer(tiny_vq_model(), folder)
    assert sorted(folder.iterdir()) == sorted(files)


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`model` is in torch.bfloat16"):
        export_image_tokenizer(tiny_vq_model().to(torch.bfloat16), tmp_path)
    with pytest.raises(TypeError, match="`model` is a MomaProcessor: give `processor.vq_model`"):
        export_image_tokenizer(tiny_processor(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    module = importlib.import_module("modeling_moma.export.image_tokenizer")
    monkeypatch.setattr(module, "_NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(ImportError, match="needs no_such_package"):
        export_image_tokenizer(tiny_vq_model(), tmp_path)
