# SPDX-License-Identifier: Apache-2.0
"""Serve a model over HTTP: `transformers serve`, with its arguments and checks of requests.

The server looks models up by name among those of Transformers. Importing this package registers its classes first.
"""

import sys


def main() -> int:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        print("error: the server needs FastAPI and others: pip install 'modeling-moma[serve]'", file=sys.stderr)
        return 2
    # typer comes with Transformers
    import typer

    from ..serving.http.server import command

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help="Serve a model over HTTP in OpenAI's form, as `transformers serve` does.")(command())
    app(prog_name="moma serve")
    return 0
