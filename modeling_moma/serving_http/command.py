# SPDX-License-Identifier: Apache-2.0
"""Arguments of `moma serve`: those of `transformers serve`, and those of the checks."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

from transformers.cli.serve import Serve
from typer import Option

from .hosts import ImageHosts
from .limits import Limits


DEFAULTS = Limits()
# an address, so that no table of names sends it elsewhere
HOST = "127.0.0.1"
# arguments of `apply_chat_template` itself, and what the server or the processor gives to a template
RESERVED = frozenset(
    "add_generation_prompt audio bos_token chat_template continue_final_message conversation documents eos_token "
    "images load_audio_from_video max_length messages padding processor_kwargs return_assistant_tokens_mask "
    "return_dict return_tensors text tokenize tokenizer_kwargs tools truncation videos".split()
)


def serve(
    *,
    api_key: Annotated[
        str | None,
        Option(
            help="Key that all routes but /health ask for, as `Authorization: Bearer KEY`. Others on this machine see "
            "arguments: the variable is safer.",
            envvar="MOMA_API_KEY",
        ),
    ] = None,
    image_hosts: Annotated[
        list[str] | None,
        Option(
            help="Host that pictures may be fetched from, with a port or without; may be repeated. By default none. "
            "A host at a private address needs the address, or its network, named as well."
        ),
    ] = None,
    template_arguments: Annotated[
        list[str] | None,
        Option(help="Name that `chat_template_kwargs` of a request may set; may be repeated. By default none."),
    ] = None,
    max_requests: Annotated[int, Option(help="Requests that are worked at at once.", min=1)] = DEFAULTS.max_requests,
    max_waiting: Annotated[
        int, Option(help="Requests that wait beside them; more get status 429.", min=0)
    ] = DEFAULTS.max_waiting,
    max_new_tokens: Annotated[
        int, Option(help="Tokens of an answer that may be asked for.", min=1)
    ] = DEFAULTS.max_new_tokens,
    max_seconds: Annotated[
        float, Option(help="Seconds of generation after which an answer ends.", min=0.1)
    ] = DEFAULTS.max_seconds,
    **options: Any,
):
    """
    Serves until it is told to end.

    Args:
        api_key, image_hosts, template_arguments: who may come, and what they may say.
        max_requests, max_waiting, max_new_tokens, max_seconds: see [`Limits`].
        options: of `transformers serve`.

    Raises:
        ValueError: an argument that would let others in unawares.
    """
    from .server import CheckedServe

    names = frozenset(_split(template_arguments))
    if taken := sorted(names & RESERVED):
        raise ValueError(f"--template-arguments: {taken[0]!r} rules the template, and is no variable of it.")
    limits = Limits(
        max_requests=max_requests,
        max_waiting=max_waiting,
        max_new_tokens=max_new_tokens,
        max_seconds=max_seconds,
        template_arguments=names,
        image_hosts=ImageHosts.from_entries(_split(image_hosts)),
        pinned=options["force_model"],
    )
    CheckedServe(limits, api_key, **options)


def command(take: Callable[..., object]) -> Callable:
    """A function with all arguments of [`serve`] in its signature, which Typer reads; it gives them to another one."""
    given = dict(inspect.signature(Serve).parameters)
    del given["non_blocking"]
    given["host"] = given["host"].replace(default=HOST)
    own = [value for value in inspect.signature(serve).parameters.values() if value.name != "options"]
    signature = [value.replace(kind=inspect.Parameter.KEYWORD_ONLY) for value in given.values()] + own

    def run(**arguments: Any):
        take(**arguments)

    vars(run)["__signature__"] = inspect.Signature(signature)
    return run


def _split(values: list[str] | None) -> list[str]:
    """Entries of a repeated argument, or of one with commas."""
    return [entry for value in values or [] for entry in value.split(",") if entry.strip()]
