# SPDX-License-Identifier: Apache-2.0
"""Print launches and waits as lines of `tests/cuda/limits.toml`, beside what this allows and aims at.

    .venv-cuda/bin/python tests/helpers/cuda/launch.py -m helpers.cuda.count "4t4i" "4t4i depth" --places

A training step of four rows, forward and backward, then a decoding step with a growing and with a static cache, of two
rows where the case names no others.
"""

import argparse
import sys
import warnings

from helpers.cuda.cases import CASES, PARTS, count
from helpers.cuda.device import open_device
from helpers.cuda.limits import read_limits
from helpers.cuda.training import count_pretraining


PRETRAINING = "pretrain"


def parse_arguments() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="helpers.cuda.count", description=summary, epilog=rest, formatter_class=formatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join([*CASES, PRETRAINING])}; by default all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="print these alone")
    parser.add_argument(
        "--places", action="store_true", help="print each launch's operation and line, and each wait's"
    )
    return parser.parse_args()


def main():
    args = parse_arguments()
    unknown = [name for name in args.names if name not in (*CASES, PRETRAINING)]
    if unknown:
        sys.exit(f"there is no case {unknown[0]!r}: take some of {', '.join([*CASES, PRETRAINING])}")
    device = open_device()
    if device is None:
        sys.exit("there is no device: start this by tests/helpers/cuda/launch.py, with a torch that is built for CUDA")
    warnings.simplefilter("ignore")
    limits = read_limits()
    for name in args.names or [*CASES, PRETRAINING]:
        print(f'["{name}"]', flush=True)
        with device:
            found = count_pretraining(device, args.places) if name == PRETRAINING else count(name, device, args.places)
            for part, counts in found:
                if part in args.parts or name == PRETRAINING:
                    print_counts(part, counts, limits.get(name, {}).get(part, {}), args.places)
        print()


def print_counts(part, counts, limit, with_places):
    line = f"{part} = {{ launches = {counts.launches}, fills = {counts.fills}, waits = {counts.waits} }}"
    others = ", ".join(f"{name} {number}" for name, number in limit.items())
    print(f"{line}  # the table has {others or 'no such part'}", flush=True)
    if not with_places:
        return
    for kind, counter in (("launches", counts.kernels), ("fills", counts.constants), ("waits", counts.syncs)):
        for name, number in counter.most_common():
            if number:
                print(f"    {number:4} {kind} {name}")


if __name__ == "__main__":
    main()
