# SPDX-License-Identifier: Apache-2.0
"""Serve a model over HTTP: `transformers serve`, with its arguments and checks of requests.

The server looks models up by name among those of Transformers. Importing this package registers its classes first.
"""

from typing import Any

from ..utils.errors import MissingExtraError
from ..utils.messages import without_import_notices


def parse_arguments(arguments: list[str] | None = None) -> dict[str, Any]:
    """Return the arguments of `serve`, as Typer reads them from the signature of Transformers' command."""
    with without_import_notices():
        from transformers.utils.import_utils import is_serve_available

        if not is_serve_available():
            raise MissingExtraError('the server needs FastAPI and others: pip install "modeling-moma[serve]"')
        # comes with Transformers
        import typer

        from ..serving.http.command import command

    given: dict[str, Any] = {}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help="Serve a model over HTTP in OpenAI's form, as `transformers serve` does.")(command(given.update))
    try:
        app(arguments, prog_name="moma serve")
    except SystemExit:
        # Typer ends the program after its command, as it does after help and errors
        if not given:
            raise
    return given


def run(arguments: dict[str, Any]) -> int:
    from ..serving.http.command import serve

    serve(**arguments)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run(parse_arguments(arguments))
