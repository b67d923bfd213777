# SPDX-License-Identifier: Apache-2.0
"""
Builds a corpus of definitions from Debian's package of WordNet: one line of text for each set of synonyms.

    python scripts/build_gloss.py --output data/gloss

Needs `apt-get` (with network at the first run) and `dpkg-deb`, or the package's file as `--archive`. Nothing is
installed.
"""

import shutil

from cards import DATA, read_card, replace_block
from corpora_recipe.debian import corpus_arguments, fetch_package
from corpora_recipe.folder import write_corpus
from corpora_recipe.gloss import PACKAGE, count_table, read_glosses, split_glosses


def main() -> None:
    args = corpus_arguments(__doc__, DATA / "gloss", size="35 MB")
    package = fetch_package(PACKAGE, args.cache, args.archive)
    rows = split_glosses(read_glosses(package.folder / "usr/share/wordnet"), validation_share=0.01)
    counts = count_table(rows, package.version)
    # the licence wants to be in every copy
    notice = package.folder / "usr/share/doc" / PACKAGE / "copyright"
    card = replace_block(read_card(args.output, "gloss"), counts)
    write_corpus(args.output, rows, card, lambda folder: shutil.copyfile(notice, folder / "LICENSE"))
    print(counts)


if __name__ == "__main__":
    main()
