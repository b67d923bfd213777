# SPDX-License-Identifier: Apache-2.0
"""The page of a Hugging Face Space: `moma demo` for the model beside this file, or the one that `MODEL` names."""

import os
from pathlib import Path

from modeling_moma.demo.page import Examples, build_page, open_page
from modeling_moma.demo.studio import load_studio


HERE = Path(__file__).resolve().parent

EXAMPLES = HERE / "examples"

studio = load_studio(os.environ.get("MODEL", HERE / "moma-icons"), library=str(EXAMPLES))
demo = build_page(studio, Examples.from_folder(EXAMPLES))

if __name__ == "__main__":
    print(open_page(demo), flush=True)
    demo.block_thread()
