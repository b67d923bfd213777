# SPDX-License-Identifier: Apache-2.0
"""`transformers serve` with checked requests."""

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastapi.exceptions import RequestValidationError
from PIL import Image
from starlette.exceptions import HTTPException
from transformers.cli.serve import Serve

from ...errors_moma import InputError
from ...hub.loading import (
    MODEL,
    PROCESSOR,
    TEXT_TOKENIZER,
    Saved,
    check_saved,
    model_type_of,
    open_checked,
    refuse_non_finite,
)
from .answering import (
    CHAT,
    COMPLETION,
    RESPONSE,
    Answering,
    answer_http_error,
    answer_input_error,
    answer_invalid_body,
)
from .downloads import Downloads, ImageHosts
from .generation import Admission, CheckedManager
from .guard import Guard, is_loopback
from .limits import MAX_CONNECTIONS, READERS, Limits


if TYPE_CHECKING:
    from fastapi import FastAPI


# what the command's help calls the model
OPTION = "FORCE_MODEL"


class CheckedServe(Serve):
    """`transformers serve` whose bad requests are answered by 4xx, before anything is generated.

    With `non_blocking` the command calls `start_server` when all is built, where this class puts its checks in front.
    [`run`] serves until it is told to end.

    Args:
        limits (`Limits`):
            of requests.
        image_hosts (`ImageHosts`):
            that images may be fetched from.
        api_key (`str`, *optional*):
            which all routes but `/health` ask for.
        enable_cors (`bool`, *optional*, defaults to `False`):
            whether pages of other sites may ask.
        options (`Any`):
            further arguments of the command.

    Raises:
        ValueError: an empty key, a server of any model that others could reach or that runs the models' own code, or
            a model that is missing, damaged or has diverged.
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
        build = partial(super().__init__, enable_cors=enable_cors, non_blocking=True, **options)
        if pinned is None:
            build()
            return
        open_checked(_check_served(pinned), OPTION, pinned, build)
        for served in self._model_manager.loaded_models.values():
            model, processor = cast(Any, served.model), cast(Any, served.processor)
            # others may lie where their numbers cannot be read from here
            if model.config.model_type in MODEL.model_types and not any(part.is_meta for part in model.parameters()):
                refuse_non_finite(model, pinned)
                if hasattr(processor, "vq_model"):
                    refuse_non_finite(processor.vq_model, f"{pinned}, image tokenizer")

    def start_server(self):
        """Add the checks."""
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
        app.add_exception_handler(ValueError, answer_input_error)
        app.add_exception_handler(RequestValidationError, answer_invalid_body)
        app.add_exception_handler(HTTPException, answer_http_error)
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

    def run(self):
        """Serve until it is told to end."""
        self.server.run()


def _check_served(name: str) -> Saved:
    """Check by its files alone that a model can be served, and return what it has to be.

    Args:
        name (`str`):
            of a folder or on the Hub, there with `@revision` or without; `:FILE.gguf` names weights in it.

    Raises:
        ValueError: there is no such folder, repository or file, or files are missing.
    """
    place, colon, gguf_file = name.rpartition(":")
    has_gguf = bool(colon) and gguf_file.endswith(".gguf")
    place = place if has_gguf else name
    if not Path(place).exists():
        place = place.partition("@")[0]
    folder = Path(place)
    if has_gguf and folder.is_dir():
        if not (folder / gguf_file).is_file():
            raise InputError(f"`{OPTION}` {name!r}: there is no file {gguf_file} in the folder.")
        return MODEL
    # the command serves models of Transformers, too
    is_other = folder.is_dir() and model_type_of(folder) not in (None, *MODEL.model_types)
    saved = replace(MODEL, model_types=()) if is_other else MODEL
    check_saved(saved, OPTION, place)
    if folder.is_dir() and not is_other:
        if not any((folder / part).exists() for part in ("processor_config.json", "vq_model")):
            check_saved(TEXT_TOKENIZER, OPTION, place)
            raise InputError(
                f"`{OPTION}` {name!r}: the folder has a tokenizer and no processor, and it is the processor of a MoMa "
                "that the server of Transformers opens: serve a model of text alone with vLLM (docs/how-to/vllm.md)."
            )
        check_saved(PROCESSOR, OPTION, place)
    return saved
