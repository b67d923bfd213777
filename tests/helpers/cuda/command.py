# SPDX-License-Identifier: Apache-2.0
"""`moma` as the user calls it, on the device of its process: `python -m helpers.cuda.command COUNTS generate ...`.

Launches and waits are written into a JSON file.
"""

import json
import sys
from pathlib import Path

from helpers.cuda.device import open_device
from modeling_moma.cli.main import main


if __name__ == "__main__":
    device = open_device()
    if device is None:
        sys.exit("there is no device: start this by tests/helpers/cuda/launch.py")
    # `main` changes them
    path, *arguments = sys.argv[1:]
    with device, device.counting() as counts:
        status = main(arguments)
    Path(path).write_text(json.dumps({"launches": counts.launches, "waits": dict(counts.syncs)}))
    sys.exit(status)
