# SPDX-License-Identifier: Apache-2.0
"""
Builds a corpus of definitions from Debian's package of WordNet: one line of text for each set of synonyms.

    python scripts/build_gloss.py --output data/gloss

Needs `apt-get` (with network at the first run) and `dpkg-deb`, or the package's file as `--archive`. Nothing is
installed.
"""

import argparse
import shutil
from pathlib import Path

from corpora_recipe.debian import DEFAULT_CACHE, fetch_package
from corpora_recipe.folder import fill_counts, read_card, write_corpus
from corpora_recipe.gloss import PACKAGE, count_table, read_glosses, split_glosses


CARD = Path(__file__).resolve().parent.parent / "data" / "gloss" / "README.md"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CARD.parent, help="folder of the data set, replaced as a whole")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder that keeps the package (35 MB)")
    parser.add_argument("--archive", type=Path, help="the package's .deb file, in place of a download")
    parser.add_argument("--validation-share", type=float, default=0.01, help="share of synsets in validation")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    package = fetch_package(PACKAGE, args.cache, args.archive)
    rows = split_glosses(read_glosses(package.folder / "usr/share/wordnet"), args.validation_share)
    counts = count_table(rows, package.version)
    # the licence wants to be in every copy
    notice = package.folder / "usr/share/doc" / PACKAGE / "copyright"
    card = fill_counts(read_card(args.output, CARD), counts)
    write_corpus(args.output, rows, card, lambda folder: shutil.copyfile(notice, folder / "LICENSE"))
    print(counts)


if __name__ == "__main__":
    main()
