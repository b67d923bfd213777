# SPDX-License-Identifier: Apache-2.0
"""Run what each extra of `pyproject.toml` is for (`extra_runs.py`) where nothing but that extra is installed.

    python tests/helpers/extras.py FOLDER [EXTRA ...]

The environments, in FOLDER, lie over a common one of the bare package, so that what is not declared is not there.
"""

import ast
import os
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
RUNS = Path(__file__).with_name("extra_runs.py")
PATHS = os.pathsep.join(str(ROOT / part) for part in (".", "scripts", "tests"))
VARIABLES = {"PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "no_proxy": "127.0.0.1"}
LAST_LINES = 12


def install(folder: Path, requirements: list[str], base: Path | None = None):
    """Make an environment of requirements, over another one where there is a base."""
    venv.create(folder, clear=True, symlinks=True, with_pip=base is None)
    if base is not None:
        (sites,) = (base / "lib").glob("python*/site-packages")
        (own,) = (folder / "lib").glob("python*/site-packages")
        # a folder alone would leave out what is installed by a link
        (own / "base.pth").write_text(f"import site; site.addsitedir({str(sites)!r})\n")
    pip = [str((base or folder) / "bin" / "python"), "-m", "pip", "--python", str(folder / "bin" / "python")]
    command = [*pip, "install", "--quiet", "--no-compile", *requirements]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "ignore"})


def runs(extra: str, folder: Path, requirements: list[str]) -> bool:
    """Whether an extra does what it is for; if not, the last lines of what it said are printed."""
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile("w+") as log:
        try:
            install(folder / extra, requirements, folder / "base")
            command = [folder / extra / "bin" / "python", "-P", RUNS, extra, place]
            streams = {"stdout": log, "stderr": subprocess.STDOUT}
            subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **VARIABLES}, timeout=600, **streams)
            return True
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            log.seek(0)
            print(f"--- {extra}: {error}", *log.read().splitlines()[-LAST_LINES:], sep="\n", file=sys.stderr)
            return False


def main(folder: str, *names: str) -> int:
    """Print a table of all extras but `dev`, or of those that are named; 1 if one of them failed."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    functions = [node for node in ast.parse(RUNS.read_text()).body if isinstance(node, ast.FunctionDef)]
    said = {node.name: ast.get_docstring(node) for node in functions}
    environments = Path(folder).absolute()
    install(environments / "base", ["--editable", str(ROOT)])
    print("| extra | what ran | seconds with the installation | |\n|---|---|---:|---|", flush=True)
    ends = []
    for extra in names or [name for name in extras if name != "dev"]:
        start = time.monotonic()
        ends.append(runs(extra, environments, extras[extra]))
        seconds, end = round(time.monotonic() - start), "ok" if ends[-1] else "failed"
        print(f"| {extra} | {said.get(f'run_{extra}', '')} | {seconds} | {end} |", flush=True)
    return 0 if all(ends) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
