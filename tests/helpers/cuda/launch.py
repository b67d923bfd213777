# SPDX-License-Identifier: Apache-2.0
"""Start Python where a CUDA device is pretended: `python tests/helpers/cuda/launch.py -m pytest tests/cuda`.

What stands between torch and its device is built here, with the system's compilers, and loaded before torch. Where a
real device is found, Python starts as it is.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
# tells a process, and those that it starts, the library that counts devices
GUARD = "MOMA_TESTS_PRETENDED_CUDA"


def build(folder: Path) -> dict[str, str]:
    """The environment variables of a process with a pretended device, whose libraries are built into a folder."""
    guard, driver = folder / "libguard.so", folder / "libcuda.so.1"
    shared = ["-shared", "-fPIC", "-O1", "-w"]
    subprocess.run(["c++", "-std=c++17", *shared, FOLDER / "guard.cpp", "-o", guard], check=True)
    subprocess.run(["cc", *shared, f"-Wl,-soname,{driver.name}", FOLDER / "driver.c", "-o", driver], check=True)
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_PRELOAD": str(guard), "LD_LIBRARY_PATH": os.pathsep.join(paths), GUARD: str(guard)}


def run(arguments: list[str]) -> int:
    """Python's exit status on these arguments, in a process of its own with a real or a pretended device."""
    paths = [str(ROOT / name) for name in (".", "scripts", "tests")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if GUARD in os.environ or has_device():
        return subprocess.call([sys.executable, *arguments], env=environment)
    with tempfile.TemporaryDirectory() as folder:
        environment |= build(Path(folder))
        return subprocess.call([sys.executable, *arguments], env=environment)


def has_device() -> bool:
    """Whether there is a real CUDA device."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
