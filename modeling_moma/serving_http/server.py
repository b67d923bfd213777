# SPDX-License-Identifier: Apache-2.0
"""`transformers serve` with checked requests."""

import ipaddress
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

from transformers.cli.serve import Serve

from .answering import CHAT, COMPLETION, RESPONSE, Answering, CheckedManager, refuse
from .downloads import Downloads
from .guard import Guard
from .limits import MAX_CONNECTIONS, READERS, Limits
from .tickets import Desk


if TYPE_CHECKING:
    from fastapi import FastAPI


class CheckedServe(Serve):
    """`transformers serve` whose bad requests are refused by 4xx, before anything is generated.

    With `non_blocking` the command calls `start_server` when all is built, where this class puts its checks in front
    and then serves until it is told to end.

    Args:
        limits: of requests.
        api_key: which all routes but `/health` ask for.
        enable_cors, options: of the command.

    Raises:
        ValueError: an empty key, or a server of any model that others could reach or that runs the models' own code.
    """

    def __init__(self, limits: Limits, api_key: str | None = None, enable_cors: bool = False, **options):
        host, pinned = options["host"], options.get("force_model")
        if api_key is not None and not api_key.strip():
            raise ValueError("--api-key: it is empty; leave it out to let everybody in who reaches the server.")
        if pinned is None and not is_loopback(host):
            raise ValueError(
                f"--host: {host!r} lets others in, who could have any model and folder loaded: name the model."
            )
        if pinned is None and options.get("trust_remote_code"):
            raise ValueError("--trust-remote-code: requests could have any code run: name the model.")
        if api_key is None and not is_loopback(host):
            print(f"warning: everybody who reaches {host} is let in (--api-key)", file=sys.stderr)
        self.limits, self.api_key, self.has_cors, self.is_local = limits, api_key, enable_cors, is_loopback(host)
        super().__init__(enable_cors=enable_cors, non_blocking=True, **options)

    def start_server(self):
        """Add the checks, and serve."""
        app, limits = cast("FastAPI", self.server.config.app), self.limits
        readers = ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="reader")
        downloads = Downloads(limits.image_hosts)
        for handler, route in (
            (self._chat_handler, CHAT),
            (self._completion_handler, COMPLETION),
            (self._response_handler, RESPONSE),
        ):
            handler.handle_request = Answering(handler, route, limits, readers, downloads)
        # managers are made at a model's first request, and this one takes its place
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
            desk=Desk(limits.max_requests, limits.max_waiting),
            api_key=self.api_key,
            pinned=limits.pinned,
            has_cors=self.has_cors,
            is_local=self.is_local,
        )
        config = self.server.config
        config.limit_concurrency, config.server_header, config.timeout_graceful_shutdown = MAX_CONNECTIONS, False, 5
        self.server.run()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
