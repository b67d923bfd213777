# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Fetch Transformers' own common model tests, which its wheel lacks, into `.cache/` at the repository's root.

    python tests/hf_common/fetch.py

They come from the source distribution of the installed version, so tests and library never differ. A second call does
not download. Nothing of it is part of this repository.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath


CACHE = Path(__file__).resolve().parents[2] / ".cache"
# the files import each other by relative path, so they need a package around them
PACKAGE = "transformers_common_tests"
PATTERNS = ("tests/test_*_common.py", "tests/test_*_mixin.py")
# modules that the files import and that the source distribution lacks: our own, with nothing to test in them
STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def common_tests_folder() -> Path:
    """The folder to put on `sys.path`; it may be missing."""
    return CACHE / f"transformers-tests-{version('transformers')}"


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


if __name__ == "__main__":
    print(f"Transformers' common tests: {fetch()}")
