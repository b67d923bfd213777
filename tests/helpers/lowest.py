# SPDX-License-Identifier: Apache-2.0
"""Print constraints for pip that hold what `pyproject.toml` asks for at the lowest release that it allows.

    python tests/helpers/lowest.py > constraints.txt

The requirements of all extras are among them. Of the patches of a release pip takes the newest.
"""

import re
import tomllib
from pathlib import Path


PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def lowest_versions(project: dict) -> dict[str, str]:
    """The least version of each package that a `[project]` table asks for and gives one, by name."""
    requirements = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        requirements += extra
    matches = [re.match(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)", requirement) for requirement in requirements]
    return {match[1]: match[2] for match in matches if match}


if __name__ == "__main__":
    for name, version in lowest_versions(tomllib.loads(PROJECT.read_text())["project"]).items():
        print(f"{name}=={version}.*")
