# SPDX-License-Identifier: Apache-2.0
"""Many, large and hostile images take little memory and few files; each case has a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.tiny import tiny_processor


ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1024
PRELUDE = """
import resource
import sys
from pathlib import Path

from tokenization import MomaImageProcessor, MomaImageProcessorPil, MomaProcessor

# getrusage would count the memory of the process that started this one
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

folder = Path(sys.argv[1])
imported = peak()
"""
EPILOGUE = """
print(peak() - imported)
"""


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
    for index in range(2000):
        Image.new("RGB", (16, 16), (index % 256, index // 256, 0)).save(folder / f"small-{index}.png")
    return folder


def peak_megabytes(code, folder):
    """Peak memory of a process that runs the code, beyond what imports take: twice as much with torch for CUDA."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PRELUDE + code + EPILOGUE, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return int(result.stdout.splitlines()[-1]) / MEGABYTE


def test_memory_does_not_grow_with_the_number_of_large_images(folder):
    code = """
processor = MomaProcessor.from_pretrained(folder / "processor")
codes = processor.encode_images([folder / "large.jpg"] * 256)
assert len(codes) == 256 and codes[0] == codes[-1]
"""
    assert peak_megabytes(code, folder) < 600


def test_more_images_than_a_process_may_open_files(folder):
    code = """
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
processor = MomaProcessor.from_pretrained(folder / "processor")
paths = [folder / f"small-{index}.png" for index in range(2000)]
codes = processor.encode_images(paths)
assert len(codes) == 2000
inputs = processor(images=[[path] for path in paths], text=["<image>"] * len(paths))
offset = processor.image_token_offset
assert [[token - offset for token in row[2:-1]] for row in inputs["input_ids"]] == codes
assert len(processor.image_processor(paths)["pixel_values"]) == 2000
"""
    assert peak_megabytes(code, folder) < 600


@pytest.mark.parametrize("length", [2_000, 60_000])
@pytest.mark.parametrize("backend", ["MomaImageProcessor", "MomaImageProcessorPil"])
def test_a_line_of_pixels_takes_no_gigabytes(folder, backend, length):
    code = f"""
pixels = {backend}.for_resolution(512)(str(folder / "{length}.png"), return_tensors="pt")["pixel_values"]
assert pixels.shape == (1, 3, 512, 512) and pixels[0, 0].min() == 1 and pixels[0, 1:].max() == -1
"""
    assert peak_megabytes(code, folder) < 200
