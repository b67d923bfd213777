# SPDX-License-Identifier: Apache-2.0
"""What a visitor is told where something cannot be done: a message on the page instead of a traceback."""

import functools
import inspect
from collections.abc import Callable, Iterator

import gradio as gr


def told_on_the_page(function: Callable) -> Callable:
    """Turns a `ValueError` of a function, or of a generator while it runs, into a message on the page."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*args, **kwargs) -> Iterator:
            try:
                yield from function(*args, **kwargs)
            except ValueError as error:
                raise refusal(error) from error

        return generator

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise refusal(error) from error

    return call


def refusal(error: ValueError) -> gr.Error:
    """The message of an error, without the traceback in the server's log."""
    return gr.Error(str(error), print_exception=False)


__all__ = ["refusal", "told_on_the_page"]
