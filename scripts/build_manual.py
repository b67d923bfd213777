# SPDX-License-Identifier: Apache-2.0
"""
Builds a corpus of pages in which text and pictures alternate from Debian's package of GIMP's user manual.

    python scripts/build_manual.py --output data/manual

Needs `apt-get` (with network at the first run) and `dpkg-deb`, or the package's file as `--archive`, and the extra
`corpora` of this package (`pip install -e ".[corpora]"`). Nothing else is installed.
"""

import argparse
from pathlib import Path

from corpora_recipe.debian import DEFAULT_CACHE, fetch_package
from corpora_recipe.folder import fill_counts, read_card, write_corpus
from corpora_recipe.manual import PACKAGE, PAGES, copy_pictures, count_table, read_manual


CARD = Path(__file__).resolve().parent.parent / "data" / "manual" / "README.md"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CARD.parent, help="folder of the data set, replaced as a whole")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder that keeps the package (123 MB)")
    parser.add_argument("--archive", type=Path, help="the package's .deb file, in place of a download")
    parser.add_argument("--validation-share", type=float, default=0.05, help="share of pages in validation")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    package = fetch_package(PACKAGE, args.cache, args.archive)
    manual = read_manual(package.folder / PAGES, args.validation_share)
    counts = count_table(manual, package.version)
    card = fill_counts(read_card(args.output, CARD), counts)
    write_corpus(args.output, manual.rows, card, lambda folder: copy_pictures(manual, folder))
    print(counts)


if __name__ == "__main__":
    main()
