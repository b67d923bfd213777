# SPDX-License-Identifier: Apache-2.0
"""`moma SUBCOMMAND ...`, also `python -m modeling_moma SUBCOMMAND ...`, each of which is a module beside this one.

Each has `parse_arguments(arguments=None)`, `run(args)`, which may return an exit status, and `main(arguments=None)`,
which is both. Only what `parse_arguments` needs is imported with it, so that help takes no time.
"""

import ast
import importlib
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from .. import register_auto_classes
from ..utils.messages import one_line


# subcommand -> module, in the order of a model's life
SUBCOMMANDS = {
    "train-image-tokenizer": "train_image_tokenizer",
    "train-audio-tokenizer": "train_audio_tokenizer",
    "build-processor": "build_processor",
    "tokenize": "tokenize",
    "plan": "plan",
    "pretrain": "pretrain",
    "upcycle": "upcycle",
    "add-layers": "add_layers",
    "calibrate": "calibrate",
    "train-auxiliary-routers": "train_auxiliary_routers",
    "evaluate": "evaluate",
    "generate": "generate",
    "build-memory": "build_memory",
    "label": "label",
    "search": "search",
    "convert": "convert",
    "push": "push",
    "serve": "serve",
    "demo": "demo",
}

# whose steps ask for the same memory again and again
TRAINING = ("train-image-tokenizer", "pretrain", "train-auxiliary-routers")


def summary(module: str) -> str:
    """Return the first line of a subcommand's docstring, read without importing what the subcommand needs."""
    source = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def usage() -> str:
    """Return the list of subcommands, one line each."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {subcommand:<{width}}  {summary(module)}" for subcommand, module in SUBCOMMANDS.items()]
    note = "`moma SUBCOMMAND --help` lists the arguments of one."
    return "\n".join(["usage: moma SUBCOMMAND [ARGUMENTS]", "", *lines, "", note])


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand."""
    with _escaped_output(sys.stdout):
        try:
            status = _run(arguments)
            # what is still to be written fails here, and not when the process ends; some services have no output
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            if not _is_unread(sys.stdout):
                raise
            _drop_output()
            return 141
        except OSError as error:
            from ..utils.errors import is_disk_full

            if not is_disk_full(error):
                raise
            print(f"error: what this command prints cannot be written: {error}.", file=sys.stderr)
            _drop_output()
            return 1
        return status


def _drop_output() -> None:
    """Let nothing more fail of what is still to be written when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _escaped_output(stream: Any) -> Iterator[None]:
    """Write characters that the encoding of a stream lacks as escapes; they would end a command after its work."""
    # other ways than an error are the user's, or those of the C locale; a notebook's stream has none
    if getattr(stream, "errors", None) != "strict" or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if not stream.closed:
            stream.reconfigure(errors="strict")


def _is_unread(stream: TextIO | None) -> bool:
    """Return whether a stream is a pipe that nobody reads."""
    if stream is None:
        return False
    try:
        poll = select.poll()
        poll.register(stream, 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    # no file, or a system without it
    except (AttributeError, OSError, ValueError):
        return False


def _run(arguments: list[str] | None) -> int:
    subcommand, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if subcommand in ("-h", "--help"):
        print(usage())
        return 0
    if subcommand not in SUBCOMMANDS:
        known = ", ".join(SUBCOMMANDS)
        print(f"moma: there is no subcommand {subcommand!r}; it must be one of {known}.", file=sys.stderr)
        return 2
    if subcommand in TRAINING:
        from ..utils.hardware import keep_freed_memory

        keep_freed_memory()
    # what a subcommand's messages and help call it
    sys.argv = [f"moma {subcommand}", *rest]
    try:
        module = importlib.import_module(f".{SUBCOMMANDS[subcommand]}", __package__)
        args = module.parse_arguments()
        register_auto_classes()
        status = module.run(args)
    except KeyboardInterrupt:
        from ..utils.errors import stopped_line

        end_progress_bars()
        print(stopped_line(subcommand), file=sys.stderr)
        return 130
    except Exception as error:
        from ..utils.errors import (
            KilledProcessError,
            MissingExtraError,
            full_disk_line,
            is_disk_full,
            is_input_error,
            is_lost_peer,
        )

        if is_disk_full(error):
            end_progress_bars()
            print(f"error: {full_disk_line(error, subcommand, output_of(rest))}", file=sys.stderr)
            return 1
        if is_lost_peer(error):
            error = KilledProcessError("another process of this training has ended; its own message says why.")
        was_killed = isinstance(error, KilledProcessError)
        if not (was_killed or isinstance(error, MissingExtraError) or is_input_error(error)):
            raise
        end_progress_bars()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1 if was_killed else 2
    return status if isinstance(status, int) else 0


def end_progress_bars() -> None:
    """End the lines of bars that an error has left open, so that its own line is one."""
    from tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def output_of(arguments: list[str]) -> str | None:
    """Return what `--output` names on a command line, `None` without it."""
    for name, value in zip(arguments, [*arguments[1:], None], strict=True):
        if name == "--output":
            return value
        if name.startswith("--output="):
            return name.partition("=")[2]
    return None


if __name__ == "__main__":
    sys.exit(main())
