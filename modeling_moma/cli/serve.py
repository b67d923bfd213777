# SPDX-License-Identifier: Apache-2.0
"""Serve a model over HTTP: `transformers serve`, with its arguments.

The server looks models up by name among those of Transformers. Importing this package registers its classes first.
"""

import sys

from transformers.cli.transformers import main as transformers_main


def main():
    sys.argv = ["transformers", "serve", *sys.argv[1:]]
    transformers_main()
