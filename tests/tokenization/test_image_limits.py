# SPDX-License-Identifier: Apache-2.0
"""Many, large and hostile images take little memory and few files; each case has a process of its own."""

import resource

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.processes import start_process
from helpers.tiny import tiny_processor
from tokenization import MomaImageProcessor, MomaImageProcessorPil, MomaProcessor


MEGABYTE = 1024
# small images, and files that their process may open
MANY, MOST_FILES = 400, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A processor, a large photograph-like image, two lines of pixels, and small images."""
    folder = tmp_path_factory.mktemp("limits")
    tiny_processor().save_pretrained(folder / "processor")
    ramp = np.linspace(0, 255, 2000).astype(np.uint8)
    large = np.stack([np.broadcast_to(ramp, (2000, 2000)), np.broadcast_to(ramp[:, None], (2000, 2000))] * 2, axis=-1)
    Image.fromarray(np.ascontiguousarray(large[..., :3])).save(folder / "large.jpg")
    for length in (2_000, 60_000):
        Image.new("RGB", (1, length), "red").save(folder / f"{length}.png")
    for index in range(MANY):
        Image.new("RGB", (16, 16), (index % 256, index // 256, 0)).save(folder / f"small-{index}.png")
    return folder


def peak() -> int:
    # getrusage would count the memory of the process that started this one
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))


def measure(work, folder, *args):
    torch.set_num_threads(1)
    before = peak()
    work(folder, *args)
    (folder / "peak").write_text(str(peak() - before))


def peak_megabytes(work, folder, *args):
    """Peak memory of a process that calls `work(folder, *args)`, beyond what imports take."""
    process = start_process(measure, work, folder, *args)
    process.join()
    assert process.exitcode == 0
    return int((folder / "peak").read_text()) / MEGABYTE


def encode_large_images(folder):
    # of 12 MB each
    codes = MomaProcessor.from_pretrained(folder / "processor").encode_images([folder / "large.jpg"] * 32)
    assert len(codes) == 32 and codes[0] == codes[-1]


def test_memory_does_not_grow_with_the_number_of_large_images(folder):
    assert peak_megabytes(encode_large_images, folder) < 200


def encode_many_images(folder):
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES, MOST_FILES))
    processor = MomaProcessor.from_pretrained(folder / "processor")
    paths = [folder / f"small-{index}.png" for index in range(MANY)]
    codes = processor.encode_images(paths)
    assert len(codes) == MANY
    assert len(processor.decode_images(codes)) == MANY
    inputs = processor(images=[[path] for path in paths], text=["<image>"] * len(paths))
    offset = processor.image_token_offset
    assert [[token - offset for token in row[2:-1]] for row in inputs["input_ids"]] == codes
    assert len(processor.image_processor(paths)["pixel_values"]) == MANY


def test_more_images_than_a_process_may_open_files(folder):
    assert peak_megabytes(encode_many_images, folder) < 600


def scale_line(folder, backend, length):
    image_processor = backend.for_resolution(512)
    pixels = image_processor(str(folder / f"{length}.png"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 512, 512) and pixels[0, 0].min() == 1 and pixels[0, 1:].max() == -1


@pytest.mark.parametrize("backend, length", [(MomaImageProcessor, 60_000), (MomaImageProcessorPil, 2_000)])
def test_a_line_of_pixels_takes_no_gigabytes(folder, backend, length):
    assert peak_megabytes(scale_line, folder, backend, length) < 200
