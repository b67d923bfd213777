# SPDX-License-Identifier: Apache-2.0
"""
Builds a corpus of pages in which text and images alternate from Debian's package of GIMP's user manual.

    python scripts/build_manual.py --output data/manual

Needs `apt-get` (with network at the first run) and `dpkg-deb`, or the package's file as `--archive`, and the extra
`corpora` of this package (`pip install -e ".[corpora]"`). Nothing else is installed.
"""

from cards import DATA, read_card, replace_block
from corpora_recipe.debian import corpus_arguments, fetch_package
from corpora_recipe.folder import write_corpus
from corpora_recipe.manual import PACKAGE, PAGES, copy_images, count_table, read_manual


def main() -> None:
    args = corpus_arguments(__doc__, DATA / "manual", size="123 MB")
    package = fetch_package(PACKAGE, args.cache, args.archive)
    manual = read_manual(package.folder / PAGES, validation_share=0.05)
    counts = count_table(manual, package.version)
    card = replace_block(read_card(args.output, "manual"), counts)
    write_corpus(args.output, manual.rows, card, lambda folder: copy_images(manual, folder))
    print(counts)


if __name__ == "__main__":
    main()
