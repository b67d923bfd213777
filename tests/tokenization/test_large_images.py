# SPDX-License-Identifier: Apache-2.0
"""Images of many millions of pixels: what they take, and that they look as they did."""

import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.scans import repeated_scan
from modeling_moma.data.images import SkippedRow, read_image
from tokenization import MomaImageProcessor, MomaImageProcessorPil, image_input_moma
from tokenization.image_input_moma import (
    MOST_LISTED,
    MOST_SCANS,
    clean_pil_image,
    jpeg_scans,
    shrink_factor,
    tiff_listed,
)


ROOT = Path(__file__).resolve().parents[2]
BACKENDS = [MomaImageProcessor, MomaImageProcessorPil]
# kind -> by how many megabytes a process may grow. Pillow takes 4 bytes a pixel of RGB, 2 of 16-bit greyscale, and of
# this JPEG a quarter of the pixels; peaks only rise, so the smallest comes first
BOUNDS = {"photo.jpg": 300, "grey.png": 400, "line.png": 600, "rgb.png": 700}
# prints by how many megabytes the process has grown after each image
GROWTH = """
import sys, warnings
from PIL import Image
import tokenization
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) // 1024
warnings.simplefilter("ignore")
processors = [tokenization.MomaImageProcessor, tokenization.MomaImageProcessorPil]
processors = [processor.for_resolution(512) for processor in processors]
for processor in processors:
    processor(Image.new("RGB", (600, 600)), return_tensors="pt")
before = peak()
# both read files alike, so that they take turns
for index, path in enumerate(sys.argv[1:]):
    pixels = processors[index % 2]([path], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 512, 512) and abs(pixels[0, 0] - 0.6).max() < 0.04, pixels[0, 0]
    print(peak() - before)
"""


def large(folder, kind):
    """A file of 144 or 120 million pixels, none of them further from 0.6 than 0.04 in its first channel."""
    size = (200_000, 600) if kind == "line.png" else (12_000, 12_000)
    image = Image.new("RGB", size, (204, 30, 60))
    if kind == "grey.png":
        image = Image.fromarray(np.full((12_000, 12_000), 204 * 257, dtype=np.uint16))
    image.save(folder / kind, **({"compress_level": 1} if kind.endswith(".png") else {}))
    return folder / kind


def test_144_million_pixels_take_hardly_more_than_their_decoder(tmp_path):
    paths = [str(large(tmp_path, kind)) for kind in BOUNDS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", GROWTH, *paths], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = dict(zip(BOUNDS, map(int, done.stdout.split())))
    assert {kind: size for kind, size in grown.items() if size > BOUNDS[kind]} == {}


def scene(width, height):
    """Smooth colours that differ everywhere, as a float array `(height, width, 3)`."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / 40) + np.cos(columns / 70), np.sin((rows + columns) / 50) * 2, columns / width * 4 - 2]
    return (np.stack(waves, axis=-1) + 2) / 4 * 255


def in_mode(mode, values):
    image = Image.fromarray(values.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((values[..., 0] * 257).astype(np.uint16))
    if mode == "P":
        return image.quantize(64)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(values[..., 2].astype(np.uint8)))
    return image.convert(mode)


MODES = ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16"]
SIZES = [(451, 391), (1203, 211)]


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(image_input_moma, "MOST_PIXELS", 2**15)
    monkeypatch.setattr(image_input_moma, "LEAST_SIDE", 64)
    monkeypatch.setattr(image_input_moma, "_BAND_PIXELS", 2**12)


@pytest.mark.parametrize("mode, size", [(mode, SIZES[place % 2]) for place, mode in enumerate(MODES)])
def test_what_is_made_smaller_looks_as_it_did(monkeypatch, small_limit, tmp_path, mode, size):
    path = tmp_path / ("image.tif" if mode in ("CMYK", "LA") else "image.png")
    in_mode(mode, scene(*size)).save(path)
    processor = MomaImageProcessor.for_resolution(48)
    clean = clean_pil_image(Image.open(path))
    assert clean.width * clean.height <= 2**15 + 1000 and min(clean.size) >= 64
    shrunk = processor([str(path)], return_tensors="pt")["pixel_values"]
    monkeypatch.undo()
    whole = processor([str(path)], return_tensors="pt")["pixel_values"]
    # in steps of 1/255
    difference = (shrunk - whole).abs() * 127.5
    assert 0 < difference.mean() < (8 if mode in ("P", "1") else 2)


def test_transparent_colour_and_orientation_survive(small_limit):
    values = scene(401, 301)
    values[:, :200] = (1, 2, 3)
    image = Image.fromarray(values.astype(np.uint8))
    image.info["transparency"] = (1, 2, 3)
    image.getexif()[0x0112] = 6
    clean = clean_pil_image(image)
    assert clean.mode == "RGBA" and clean.width < clean.height < 301
    # what was on the left is above, once the image is turned
    alpha = np.asarray(clean)[..., 3]
    half = 200 * clean.height // 401
    assert (alpha[: half - 2] == 0).all() and (alpha[half + 2 :] == 255).all()


def test_transparent_value_of_sixteen_bit_greyscale_survives(small_limit):
    values = (scene(401, 301)[..., 0] * 200).astype(np.uint16) + 10
    values[:, :200] = 7
    image = Image.fromarray(values)
    image.info["transparency"] = 7
    alpha = np.asarray(clean_pil_image(image))[..., 1]
    half = 200 * alpha.shape[1] // 401
    assert (alpha[:, : half - 2] == 0).all() and (alpha[:, half + 2 :] == 255).all()


def test_an_open_image_keeps_its_size_for_the_caller(small_limit, tmp_path):
    path = tmp_path / "photo.jpg"
    in_mode("RGB", scene(800, 600)).save(path)
    processor = MomaImageProcessor.for_resolution(48)
    with Image.open(path) as image:
        given = processor([image], return_tensors="pt")["pixel_values"]
        assert image.size == (800, 600)
        assert np.array_equal(image, Image.open(path))
    read = processor([str(path)], return_tensors="pt")["pixel_values"]
    # in steps of 1/255
    assert (given - read).abs().mean() * 127.5 < 2
    assert clean_pil_image(Image.open(path), is_own=True).size == (200, 150)


def test_no_side_gets_short_and_ordinary_images_stay_as_they_are():
    assert shrink_factor((12_000, 12_000)) == 3
    assert shrink_factor((12_000, 8_000)) == 2
    assert shrink_factor((30_000, 4_000)) == 1
    assert shrink_factor((5_700, 5_700)) == shrink_factor((1, 1)) == 1


def test_scans_of_a_jpeg_are_counted_and_nothing_else():
    usual = jpeg_scans(repeated_scan(0))
    assert 1 < usual < 20 and jpeg_scans(repeated_scan(7)) == usual + 7
    plain = BytesIO()
    Image.new("L", (64, 64)).save(plain, "JPEG", restart_marker_blocks=2, comment=b"\xff\xda" * 9)
    # a camera appends a film
    assert jpeg_scans(plain.getvalue() + b"\xff\xda" * 9) == 1
    # fill bytes, and segments that are cut or shorter than their own length
    assert jpeg_scans(b"\xff\xd8\xff\xff\xff\xda\0\0\xff\xda\0\2\xff\x00\xff\xda") == 3
    assert jpeg_scans(b"") == jpeg_scans(b"\x89PNG\xff\xda") == jpeg_scans(b"\xff\xd8") == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_jpeg_of_many_scans_is_refused(tmp_path, backend):
    path = tmp_path / "scans.jpg"
    path.write_bytes(repeated_scan(MOST_SCANS))
    with pytest.raises(ValueError, match=r"scans\.jpg' has 1\d\d scans, more than 100"):
        backend.for_resolution(32)(str(path), return_tensors="pt")
    for source in (str(path), path.read_bytes()):
        with pytest.raises(SkippedRow, match=r"image damaged: .* has 1\d\d scans"):
            read_image(source)
    path.write_bytes(repeated_scan(MOST_SCANS // 2))
    assert read_image(str(path))[0].size == (64, 64)


def tiff_of_strips(number, big_tiff=False):
    """A TIFF whose rows of one pixel are strips of their own."""
    file = BytesIO()
    rows_per_strip = 278
    Image.new("L", (1, number)).save(file, "TIFF", tiffinfo={rows_per_strip: 1}, big_tiff=big_tiff)
    return file.getvalue()


@pytest.mark.parametrize("big_tiff", [False, True])
def test_strips_of_a_tiff_are_counted_and_bytes_are_not(big_tiff):
    few, more = (tiff_listed(tiff_of_strips(number, big_tiff)) for number in (50, 500))
    assert 100 < few < 120 and more == few + 2 * 450
    described, profile = BytesIO(), 34675
    Image.new("L", (8, 8)).save(described, "TIFF", tiffinfo={profile: bytes(2 * MOST_LISTED)}, big_tiff=big_tiff)
    assert tiff_listed(described.getvalue()) < 20
    # directories that are cut, or promise more entries than there are bytes
    whole = tiff_of_strips(3, big_tiff)
    assert all(tiff_listed(whole[:length]) <= tiff_listed(whole) for length in range(len(whole)))
    assert tiff_listed(b"II*\0\x08\0\0\0\xff\xff") == tiff_listed(b"MM\0*\xff\xff\xff\xff") == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tiff_of_many_strips_is_refused(tmp_path, backend):
    path = tmp_path / "strips.tif"
    path.write_bytes(tiff_of_strips(MOST_LISTED // 2))
    with pytest.raises(ValueError, match=r"strips\.tif' lists 262\d\d\d numbers in its header, more than 262144"):
        backend.for_resolution(32)(str(path), return_tensors="pt")
    for source in (str(path), path.read_bytes()):
        with pytest.raises(SkippedRow, match=r"image damaged: .* lists 262\d\d\d numbers"):
            read_image(source)
    path.write_bytes(tiff_of_strips(2000))
    assert read_image(str(path))[0].size == (1, 2000)
