# SPDX-License-Identifier: Apache-2.0
"""Arguments of `moma serve`: those of `transformers serve`, and those of the checks."""

import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

from transformers.cli.serve import Serve
from transformers.utils.logging import log_levels
from typer import Option

from ...errors_moma import InputError
from .errors import short
from .limits import Limits


DEFAULTS = Limits()
# an address rather than localhost, which a hosts file may send elsewhere
HOST = "127.0.0.1"
MAX_PORT = 2**16 - 1
# what the server itself gives to `apply_chat_template`, and that to the template: given twice, no request is answered
SERVER_ARGUMENTS = frozenset(
    "add_generation_prompt continue_final_message conversation messages return_dict return_tensors tokenize".split()
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
            help="Host that images may be fetched from, with a port or without; may be repeated. By default none. "
            "A host at a private address needs the address, or its network, named as well."
        ),
    ] = None,
    template_arguments: Annotated[
        list[str] | None,
        Option(help="Name that `chat_template_kwargs` of a request may set; may be repeated. By default none."),
    ] = None,
    max_requests: Annotated[
        int, Option(help="Requests admitted at once, answered one by one.", min=1)
    ] = DEFAULTS.max_requests,
    max_waiting: Annotated[
        int, Option(help="Requests queued beside them; more get status 429.", min=0)
    ] = DEFAULTS.max_waiting,
    max_new_tokens: Annotated[
        int, Option(help="Tokens of an answer that may be asked for.", min=1)
    ] = DEFAULTS.max_new_tokens,
    max_seconds: Annotated[
        float, Option(help="Seconds of generation after which an answer ends.", min=0.1)
    ] = DEFAULTS.max_seconds,
    **options: Any,
):
    """Serve until it is told to end.

    Args:
        api_key (`str`, *optional*):
            key that all routes but `/health` ask for.
        image_hosts (`list[str]`, *optional*):
            hosts that images may be fetched from.
        template_arguments (`list[str]`, *optional*):
            names that `chat_template_kwargs` of a request may set.
        max_requests (`int`, *optional*):
            see [`Limits`], as for the next three.
        max_waiting (`int`, *optional*):
            requests queued beside them.
        max_new_tokens (`int`, *optional*):
            tokens of an answer.
        max_seconds (`float`, *optional*):
            seconds of generation.
        options (`Any`):
            of `transformers serve`.

    Raises:
        ValueError: an argument that would let others in unawares or that cannot be read, or a model that cannot be
            loaded.
    """
    from .downloads import ImageHosts
    from .server import CheckedServe

    _check_options(options)
    names = frozenset(_split(template_arguments))
    if taken := sorted(names & reserved_names()):
        raise InputError(f"--template-arguments: {taken[0]!r} rules the template, and is no variable of it.")
    limits = Limits(
        max_requests=max_requests,
        max_waiting=max_waiting,
        max_new_tokens=max_new_tokens,
        max_seconds=max_seconds,
        template_arguments=names,
        pinned=options["force_model"],
    )
    CheckedServe(limits, ImageHosts.from_entries(_split(image_hosts)), api_key, **options).run()


def reserved_names() -> frozenset[str]:
    """Return arguments of `apply_chat_template` itself, and what the server or the processor gives to a template."""
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    return frozenset("audio bos_token eos_token images messages text videos".split()).union(
        *[inspect.signature(kind.apply_chat_template).parameters for kind in (ProcessorMixin, PreTrainedTokenizerBase)]
    )


def command(take: Callable[..., object]) -> Callable:
    """Return a function with all arguments of [`serve`] in its signature, for Typer; it passes them on."""
    given = dict(inspect.signature(Serve).parameters)
    del given["non_blocking"]
    given["host"] = given["host"].replace(default=HOST)
    own = [value for value in inspect.signature(serve).parameters.values() if value.name != "options"]
    signature = [value.replace(kind=inspect.Parameter.KEYWORD_ONLY) for value in given.values()] + own

    def run(**arguments: Any):
        take(**arguments)

    vars(run)["__signature__"] = inspect.Signature(signature)
    return run


def _check_options(options: dict[str, Any]) -> None:
    """Check arguments of `transformers serve` that it would answer by a traceback."""
    level, arguments = options.get("log_level"), options.get("chat_template_kwargs")
    if not 0 <= options.get("port", 0) <= MAX_PORT:
        raise InputError(f"--port: {options['port']} must be from 0 to {MAX_PORT}.")
    if level is not None and level.lower() not in log_levels:
        raise InputError(f"--log-level: {level!r} must be one of {', '.join(log_levels)}.")
    if not arguments:
        return
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--chat-template-kwargs: {short(arguments)} is no JSON ({error}).") from error
    if not isinstance(given, dict):
        raise InputError(f"--chat-template-kwargs: {short(arguments)} must be a JSON object.")
    if taken := sorted(given.keys() & SERVER_ARGUMENTS):
        raise InputError(f"--chat-template-kwargs: {taken[0]!r} is set by the server, for each request.")


def _split(values: list[str] | None) -> list[str]:
    """Return the entries of a repeated argument, or of one with commas."""
    return [entry for value in values or [] for entry in value.split(",") if entry.strip()]
