# SPDX-License-Identifier: Apache-2.0
"""Serve a model over HTTP in OpenAI's form: words and images in, words and images out.

moma serve model_cards/moma-icons
"""

import argparse
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors_moma import InputError
from ..utils.errors import needs_extra
from ..utils.fields import Count, Float, Int
from ..utils.messages import without_import_notices
from .arguments import Flag, parse_fields


OfLimits = Flag(section="limits")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma serve`.

    Args:
        model (`str`):
            folder or Hub name of a model with its processor.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            0.0.0.0 lets other machines in; by default this one alone.
        port (`int`, *optional*, defaults to `8000`):
            0 for any free one.
        api_key (`str`, *optional*):
            that all routes but /health ask for. Others on this machine see arguments: the variable MOMA_API_KEY is
            safer.
        max_waiting (`int`, *optional*, defaults to `32`):
            requests that may wait while one is answered; more get status 429.
        max_new_tokens (`int`, *optional*, defaults to `4096`):
            tokens of an answer in words that may be asked for.
        max_seconds (`float`, *optional*, defaults to `120.0`):
            after which an answer ends.
        device (`str`, *optional*):
            such as cpu or cuda:1; by default a GPU where there is one.
        dtype (`Literal["auto", "float32", "bfloat16", "float16"]`, *optional*):
            by default float32 on a CPU, else as the model was saved.
    """

    model: Annotated[str, Flag(metavar="MODEL", is_positional=True)]
    host: str = "127.0.0.1"
    port: Annotated[Int, Field(ge=0, le=65535)] = 8000
    api_key: str | None = None
    max_waiting: Annotated[Int, Field(ge=0), OfLimits] = 32
    max_new_tokens: Annotated[Count, OfLimits] = 4096
    max_seconds: Annotated[Float, Field(gt=0), OfLimits] = 120.0
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(args: Arguments) -> None:
    with needs_extra("the server needs FastAPI and uvicorn", "serve"), without_import_notices():
        import torch

        from ..hub.loading import open_model, open_processor
        from ..serving.http.generation import Engine
        from ..serving.http.guard import is_loopback
        from ..serving.http.server import serve

    api_key = os.environ.get("MOMA_API_KEY") if args.api_key is None else args.api_key
    if api_key is not None and not api_key.strip():
        raise InputError("--api-key: it is empty; leave it out to let everybody in who reaches the server.")
    if api_key is None and not is_loopback(args.host):
        print(f"warning: everybody who reaches {args.host} is let in (--api-key)", file=sys.stderr)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    # torch raises whatever its build has for a device that is not there
    except Exception as error:
        raise InputError(f"--device: {device!r} cannot be used ({error}).") from error
    dtype = args.dtype or ("float32" if device == "cpu" else "auto")
    model: Any = open_model(args.model, "MODEL", dtype=dtype).to(device).eval()
    processor = open_processor(args.model, "MODEL").to(device)
    engine = Engine(model, processor, args.model, args.max_waiting, args.max_new_tokens, args.max_seconds)
    serve(engine, args.host, args.port, api_key)


def main(arguments: list[str] | None = None) -> None:
    run(parse_arguments(arguments))
