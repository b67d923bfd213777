# SPDX-License-Identifier: Apache-2.0
"""Serve a model over HTTP: `transformers serve`, with its arguments and checks of requests.

The server looks models up by name among those of Transformers. Importing this package registers its classes first.
"""


def main():
    # comes with Transformers
    import typer

    from ..serving_http.command import command

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help="Serve a model over HTTP in OpenAI's form, as `transformers serve` does.")(command())
    app(prog_name="moma serve")
