# SPDX-License-Identifier: Apache-2.0
"""Fetch Transformers' own common tests, which its wheel lacks, into `.cache/` at the repository's root.

    python tests/helpers/fetch.py

They come from the source distribution of the installed version, so tests and library never differ. A second call does
not download. Nothing of it is part of this repository.

The source distribution has the files at the top of Transformers' `tests` folder and none of its sub-folders. So there
are no generation tests in it (`tests/generation/test_utils.py`), no export tests and no pipeline tests. Generation is
covered by our own `tests/modeling/test_generation_moma.py` and `tests/modeling/test_cached_equals_uncached.py`,
pipelines by `tests/test_pipelines.py`, export by `tests/modeling/test_export.py`.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from PIL import Image


CACHE = Path(__file__).resolve().parents[2] / ".cache"
# the files import each other by relative path, so they need a package around them
PACKAGE = "transformers_common_tests"
PATTERNS = ("tests/test_*_common.py", "tests/test_*_mixin.py")
# takes the place of every image that the tests would load from the web
IMAGE = "image.png"
# modules that the files import and that the source distribution lacks: our own, and none with tests in it
STAND_INS = {
    "../fetch_hub_objects_for_ci.py": f"""from pathlib import Path

def url_to_local_path(url):
    return str(Path(__file__).with_name("{IMAGE}")) if url.endswith((".png", ".jpg")) else url
""",
    "__init__.py": "",
    "distributed_testing_utils.py": "from helpers.hf_distributed import *\n",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "fixtures/sample_text.txt": "",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": """config_common_kwargs = {
    "architectures": ["AModel"], "chunk_size_feed_forward": 3, "dtype": "float16", "output_attentions": True,
    "output_hidden_states": True, "problem_type": "regression", "return_dict": False,
}
""",
}


def common_tests_folder() -> Path:
    """The folder to put on `sys.path`; it may be missing."""
    return CACHE / f"transformers-tests-{version('transformers')}"


def is_fetched() -> bool:
    """Whether the files are there, with the stand-ins as they are above."""
    paths = {common_tests_folder() / PACKAGE / name: text for name, text in STAND_INS.items()}
    return all(path.is_file() and path.read_text() == text for path, text in paths.items())


def fetch() -> Path:
    """Download and unpack the files unless they are there, and return their folder.

    Raises:
        subprocess.CalledProcessError: the download failed.
    """
    folder = common_tests_folder()
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as aside:
            archive = _download(Path(aside))
            unpacked = Path(aside) / "unpacked"
            _unpack(archive, unpacked / PACKAGE)
            unpacked.rename(folder)
    for name, text in STAND_INS.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    _draw_image(folder / IMAGE)
    return folder


def _download(target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    subprocess.run([*command, "--dest", str(target), f"transformers=={version('transformers')}"], check=True)
    return next(target.glob("transformers-*.tar.gz"))


def _unpack(archive: Path, target: Path):
    target.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if member.isfile() and any(path.match(f"*/{pattern}") for pattern in PATTERNS):
                (target / path.name).write_bytes(tar.extractfile(member).read())


def _draw_image(path: Path):
    # smooth areas, sharp edges and three channels that differ, as a photograph has
    shapes = [Image.effect_mandelbrot((640, 480), (x, -1.2, x + 3, 1.2), 60) for x in (-2.2, -1.9, -1.6)]
    Image.merge("RGB", shapes).save(path)


if __name__ == "__main__":
    print(f"Transformers' common tests: {fetch()}")
