# SPDX-License-Identifier: Apache-2.0
"""`moma serve`: `transformers serve` with its arguments, those of the checks, and checked requests."""

import inspect
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, cast

from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.cli.serve import Serve
from typer import Option

from ...errors_moma import InputError
from .answering import CHAT, COMPLETION, RESPONSE, Answering, refuse
from .downloads import Downloads, ImageHosts
from .generation import Admission, CheckedManager
from .guard import Guard, is_loopback
from .limits import MAX_CONNECTIONS, READERS, Limits


if TYPE_CHECKING:
    from fastapi import FastAPI

DEFAULTS = Limits()
# an address rather than localhost, which a hosts file may send elsewhere
HOST = "127.0.0.1"
# arguments of `apply_chat_template` itself, and what the server or the processor gives to a template
RESERVED = frozenset("audio bos_token eos_token images messages text videos".split()).union(
    *[inspect.signature(kind.apply_chat_template).parameters for kind in (ProcessorMixin, PreTrainedTokenizerBase)]
)


class CheckedServe(Serve):
    """`transformers serve` whose bad requests are refused by 4xx, before anything is generated.

    With `non_blocking` the command calls `start_server` when all is built, where this class puts its checks in front
    and then serves until it is told to end.

    Args:
        limits: of requests.
        image_hosts: that pictures may be fetched from.
        api_key: which all routes but `/health` ask for.
        enable_cors, options: of the command.

    Raises:
        ValueError: an empty key, or a server of any model that others could reach or that runs the models' own code.
    """

    def __init__(
        self,
        limits: Limits,
        image_hosts: ImageHosts,
        api_key: str | None = None,
        enable_cors: bool = False,
        **options,
    ):
        host, pinned = options["host"], options.get("force_model")
        if api_key is not None and not api_key.strip():
            raise InputError("--api-key: it is empty; leave it out to let everybody in who reaches the server.")
        if pinned is None and not is_loopback(host):
            raise InputError(
                f"--host: {host!r} lets others in, who could have any model and folder loaded: name the model."
            )
        if pinned is None and options.get("trust_remote_code"):
            raise InputError("--trust-remote-code: requests could have any code run: name the model.")
        if api_key is None and not is_loopback(host):
            print(f"warning: everybody who reaches {host} is let in (--api-key)", file=sys.stderr)
        self.limits, self.image_hosts = limits, image_hosts
        self.api_key, self.has_cors, self.is_local = api_key, enable_cors, is_loopback(host)
        super().__init__(enable_cors=enable_cors, non_blocking=True, **options)

    def start_server(self):
        """Add the checks, and serve."""
        # requests are bounded by `MAX_PIXELS`, below where Pillow warns
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        app, limits = cast("FastAPI", self.server.config.app), self.limits
        readers = ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="reader")
        downloads = Downloads(self.image_hosts)
        for handler, route in (
            (self._chat_handler, CHAT),
            (self._completion_handler, COMPLETION),
            (self._response_handler, RESPONSE),
        ):
            handler.handle_request = Answering(handler, route, limits, readers, downloads)
        # Transformers makes a manager at a model's first request; ours is put there before
        managers = self._generation_state._generate_managers
        get_manager = self._generation_state.get_manager

        def get_checked_manager(model_id: str, use_cb: bool = False):
            if not use_cb and model_id not in managers:
                managers[model_id] = CheckedManager()
            return get_manager(model_id, use_cb=use_cb)

        self._generation_state.get_manager = get_checked_manager
        app.add_exception_handler(ValueError, refuse)
        app.add_middleware(
            Guard,
            admission=Admission(limits.max_requests, limits.max_waiting),
            api_key=self.api_key,
            pinned=limits.pinned,
            has_cors=self.has_cors,
            is_local=self.is_local,
        )
        config = self.server.config
        config.limit_concurrency, config.server_header, config.timeout_graceful_shutdown = MAX_CONNECTIONS, False, 5
        self.server.run()


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
    max_requests: Annotated[int, Option(help="Requests processed concurrently.", min=1)] = DEFAULTS.max_requests,
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
    """
    Serves until it is told to end.

    Args:
        api_key, image_hosts, template_arguments: who may come, and what they may say.
        max_requests, max_waiting, max_new_tokens, max_seconds: see [`Limits`].
        options: of `transformers serve`.

    Raises:
        ValueError: an argument that would let others in unawares.
    """
    names = frozenset(_split(template_arguments))
    if taken := sorted(names & RESERVED):
        raise InputError(f"--template-arguments: {taken[0]!r} rules the template, and is no variable of it.")
    limits = Limits(
        max_requests=max_requests,
        max_waiting=max_waiting,
        max_new_tokens=max_new_tokens,
        max_seconds=max_seconds,
        template_arguments=names,
        pinned=options["force_model"],
    )
    CheckedServe(limits, ImageHosts.from_entries(_split(image_hosts)), api_key, **options)


def command() -> Callable:
    """[`serve`] with all arguments in its signature, which typer reads."""
    given = dict(inspect.signature(Serve).parameters)
    del given["non_blocking"]
    given["host"] = given["host"].replace(default=HOST)
    own = [value for value in inspect.signature(serve).parameters.values() if value.name != "options"]
    signature = [value.replace(kind=inspect.Parameter.KEYWORD_ONLY) for value in given.values()] + own

    def run(**arguments: Any):
        serve(**arguments)

    vars(run)["__signature__"] = inspect.Signature(signature)
    return run


def _split(values: list[str] | None) -> list[str]:
    """Entries of a repeated argument, or of one with commas."""
    return [entry for value in values or [] for entry in value.split(",") if entry.strip()]
