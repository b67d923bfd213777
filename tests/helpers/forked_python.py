# SPDX-License-Identifier: Apache-2.0
"""Python for a test that needs a process of its own, forked from an interpreter that has torch imported.

Of the ten seconds that a process takes to import our packages, most go into libraries that read no setting of a test's
own. What reads some when it is imported (Transformers, Datasets, the Hub's client, ours) is imported anew each time.
"""

import atexit
import gc
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path


IMPORTED = (
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.data", "torchvision"),
    *("torchao.quantization", "torchao.prototype.safetensors.safetensors_support", "bitsandbytes"),
    *("pandas", "pyarrow.dataset", "pyarrow.parquet", "scipy.stats", "sklearn.metrics", "PIL.Image"),
)


def run_python(
    arguments: Sequence[str | Path],
    *,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 200,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`, sooner.

    Not for what measures memory or time, looks at the first lines of a terminal, or sets what torch reads when it is
    imported (`OMP_NUM_THREADS`).

    Args:
        arguments: of Python: `-P` where wanted, then `-c` and code, `-m` and a module, or a script; and its own.
        cwd: where the process runs.
        env: its variables; those of this process by default.
        timeout: seconds after which it is killed.

    Raises:
        subprocess.TimeoutExpired: it was killed.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        request = {
            "arguments": [os.fspath(argument) for argument in arguments],
            "cwd": os.fspath(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
            "files": [str(output), str(errors)],
            "timeout": timeout,
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = json.loads(server.stdout.readline())
        written = output.read_text(), errors.read_text()
    command = [sys.executable, *request["arguments"]]
    if status is None:
        raise subprocess.TimeoutExpired(command, timeout, *written)
    return subprocess.CompletedProcess(command, status, *written)


@cache
def _server() -> subprocess.Popen:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-P", __file__], env=own, text=True, **pipes)
    atexit.register(server.kill)
    return server


def _serve():
    # bitsandbytes would ask the Hub's client for one
    sys.modules["kernels"] = None
    for name in IMPORTED:
        # each belongs to an extra that need not be installed
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    del sys.modules["kernels"]
    # a fork that collects garbage would copy all of it
    gc.freeze()
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            return request
        replies.write(json.dumps(_wait(process, request["timeout"])) + "\n")
        replies.flush()
    sys.exit()


def _wait(process: int, timeout: float) -> int | None:
    """The status that `subprocess` would give, none for one that took too long."""

    def kill(*_):
        nonlocal late
        late = True
        os.killpg(process, signal.SIGKILL)

    late = False
    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None if late else status


def _become(request):
    """Run what Python would run with these arguments, as its main module."""
    os.setsid()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number, name in zip((0, 1, 2), (os.devnull, *request["files"]), strict=True):
        file = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)

    arguments = list(request["arguments"])
    safe_path = arguments[0] == "-P"
    arguments = arguments[safe_path:]
    paths = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    if arguments[0] in ("-c", "-m"):
        kind, what, *own = arguments
        first = "" if kind == "-c" else request["cwd"]
    else:
        kind, what, own = "file", arguments[0], arguments[1:]
        first = os.path.dirname(os.path.abspath(what))
    sys.path[:0] = [*([] if safe_path else [first]), *paths]
    # our package tells its own command by it
    sys.orig_argv = [sys.executable, *request["arguments"]]
    return kind, what, own


def _run(kind, what, own):
    if kind == "-c":
        sys.argv = ["-c", *own]
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(what, "<string>", "exec"), module.__dict__)
        return
    sys.argv = [what, *own]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


def own_words(said: str) -> str:
    """What a process said, without what Triton's bindings report as it ends, from Python 3.13 on."""
    return re.sub(r"(?ms)^nanobind: leaked .*?refleaks\.html\n?", "", said)


if __name__ == "__main__":
    _run(*_become(_serve()))
