# SPDX-License-Identifier: Apache-2.0
"""A server of a model under load: many clients at once, some of whom hang up or ask what cannot be answered.

python -m benchmarks.serving_load --seconds 300 --report benchmarks/reports

`moma serve` runs in a process of its own. Every client asks for greedy answers, streamed or whole, to words, to
images and to bare prompts; each answer has to equal that of `generate` alone. One request in eight is cancelled in
the middle of its stream, one in eight before its answer comes, and one in eight is bad and has to be refused with a
status from 400 to 499 and a message that names the field. Memory, open files and threads of the server are taken when
it is idle, after a warm-up of a fifth of the time and at the end. The exit status is 1 where an answer is wrong, a bad
request is not refused so, something leaks or the server prints a traceback.
"""

import argparse
import asyncio
import math
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import httpx
import psutil
import torch

from benchmarks.data_pipeline import anonymous_bytes
from benchmarks.serving_requests import BadRequest, Question, bad_requests, questions
from benchmarks.speed.results import dated_file
from scripts.server_process import running


# the process may have grown by so much at the end since its warm-up
MEMORY_SHARE, FILES, THREADS = 0.10, 2, 2


@dataclass
class Held:
    """What a process holds: MiB that no file stands behind, open files with sockets, threads."""

    mib: float
    files: int
    threads: int


@dataclass
class Outcome:
    """What all clients saw in one phase: numbers of requests by kind, seconds of answers, and what went wrong."""

    counts: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/moma-emoji", help="folder with a processor")
    parser.add_argument("--seconds", type=float, default=300, help="of load, its warm-up included")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16, help="most of an answer")
    parser.add_argument("--report", help="folder for a dated report")
    args = parser.parse_args(arguments)
    # without answers nothing would be wrong
    for name in ("clients", "new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least 1")
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds {args.seconds}: it must be positive")
    return args


@contextmanager
def running_server(model: str, log: Path):
    """Address and process of `moma serve`, which is ended afterwards."""
    command = [sys.executable, "-m", "modeling_moma", "serve", model, "--device", "cpu", "--dtype", "float32"]
    with running([*command, "--host", "127.0.0.1"], log) as (address, server):
        yield address, psutil.Process(server.pid)


def held(process: psutil.Process) -> Held:
    return Held(anonymous_bytes(process) / 2**20, process.num_fds(), process.num_threads())


class Load:
    """Clients that ask one server until a time is over.

    Args:
        client: shared by all; every request has a connection of its own, as strangers have.
        asked: questions and their answers.
        bad: requests that have to be refused.
    """

    def __init__(self, client: httpx.AsyncClient, asked: list[Question], bad: list[BadRequest]):
        self.client, self.asked, self.bad = client, asked, bad
        self.outcome = Outcome()

    async def run(self, clients: int, seconds: float, seed: int) -> Outcome:
        """One phase, which ends when the last answer is there."""
        self.outcome = Outcome()
        end = time.monotonic() + seconds
        await asyncio.gather(*[self._ask_until(end, random.Random(seed * clients + n)) for n in range(clients)])
        return self.outcome

    async def _ask_until(self, end: float, dice: random.Random):
        while time.monotonic() < end:
            kind, question = dice.random(), dice.choice(self.asked)
            try:
                if kind < 1 / 8:
                    await self._refused(dice.choice(self.bad))
                elif kind < 2 / 8:
                    await self._hang_up_in_the_stream(question, dice.randint(1, 4))
                elif kind < 3 / 8:
                    await self._hang_up_before_the_answer(question, dice.uniform(0.05, 1))
                else:
                    await self._answered(question, dice.random() < 0.5)
            except httpx.HTTPError as error:
                self.outcome.faults.append(f"{question.name}: {error!r}")

    async def _answered(self, question: Question, streamed: bool):
        began = time.monotonic()
        if streamed:
            async with self.client.stream("POST", question.path, json={**question.body, "stream": True}) as response:
                pieces = [question.piece(line) async for line in response.aiter_lines() if line]
            answer = "".join(pieces)
        else:
            response = await self.client.post(question.path, json=question.body)
            answer = question.whole(response.json()) if response.status_code == 200 else response.text
        self.outcome.seconds.append(time.monotonic() - began)
        self.outcome.counts["streamed" if streamed else "whole"] += 1
        if answer != question.answer:
            self.outcome.counts["wrong"] += 1
            self.outcome.faults.append(f"{question.name}: {answer!r}, but `generate` gives {question.answer!r}")

    async def _hang_up_in_the_stream(self, question: Question, pieces: int):
        # a long answer leaves something to cancel
        body = {**question.body, "stream": True, "max_tokens": 400}
        async with self.client.stream("POST", question.path, json=body) as response:
            if response.status_code != 200:
                self.outcome.faults.append(f"{question.name}: {response.status_code} {await response.aread()!r}")
                return
            async for line in response.aiter_lines():
                pieces -= bool(line)
                if pieces < 0:
                    self.outcome.counts["cancelled in the stream"] += 1
                    break

    async def _hang_up_before_the_answer(self, question: Question, patience: float):
        try:
            async with asyncio.timeout(patience):
                await self.client.post(question.path, json=question.body)
        except TimeoutError:
            self.outcome.counts["cancelled before the answer"] += 1

    async def _refused(self, request: BadRequest):
        response = await self.client.post(request.path, **request.content)
        self.outcome.counts["refused"] += 1
        if not 400 <= response.status_code < 500 or request.names not in response.text:
            self.outcome.counts["wrongly refused"] += 1
            self.outcome.faults.append(f"{request.name}: {response.status_code} {response.text[:200]}")


async def measure(args: argparse.Namespace, address: str, server: psutil.Process, asked: list[Question]):
    """What the server holds after the warm-up and at the end, and what the clients saw after the warm-up."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits, trust_env=False) as client:
        load = Load(client, asked, bad_requests(args.model))
        # every bad request once, so that none is left to chance
        for request in load.bad:
            await load._refused(request)
        first = load.outcome
        warm_up = await load.run(args.clients, args.seconds / 5, seed=0)
        before = await idle(client, asked[0], server)
        began = time.monotonic()
        outcome = await load.run(args.clients, args.seconds * 4 / 5, seed=1)
        wall = time.monotonic() - began
        after = await idle(client, asked[0], server)
    outcome.faults = [*first.faults, *warm_up.faults, *outcome.faults]
    return before, after, outcome, wall


async def idle(client: httpx.AsyncClient, question: Question, server: psutil.Process) -> Held:
    """What the server holds when all that was asked before is done: it answers one request after the other."""
    await client.post(question.path, json=question.body)
    await asyncio.sleep(0.5)
    return held(server)


def leaks(before: Held, after: Held) -> list[str]:
    """What grew by more than is allowed."""
    found = []
    if after.mib > before.mib * (1 + MEMORY_SHARE):
        found.append(f"memory grew from {before.mib:.0f} to {after.mib:.0f} MiB")
    if after.files > before.files + FILES:
        found.append(f"open files grew from {before.files} to {after.files}")
    if after.threads > before.threads + THREADS:
        found.append(f"threads grew from {before.threads} to {after.threads}")
    return found


def report(args: argparse.Namespace, before: Held, after: Held, outcome: Outcome, wall: float) -> list[str]:
    counts, seconds = outcome.counts, sorted(outcome.seconds)
    answers = counts["streamed"] + counts["whole"]
    rows = {
        "answers, streamed": counts["streamed"],
        "answers, whole": counts["whole"],
        "of them other than what `generate` gives alone": counts["wrong"],
        "cancelled in the middle of the stream": counts["cancelled in the stream"],
        "cancelled before the answer": counts["cancelled before the answer"],
        "bad requests": counts["refused"],
        "of them not refused by 4xx and the name of the field": counts["wrongly refused"],
        "answers a second": f"{answers / wall:.1f}",
        "seconds of an answer, median": f"{statistics.median(seconds):.2f}" if seconds else "none",
        "seconds of an answer, 95 of 100": f"{seconds[int(0.95 * len(seconds))]:.2f}" if seconds else "none",
        "memory after the warm-up, MiB": f"{before.mib:.0f}",
        "memory at the end, MiB": f"{after.mib:.0f}",
        "open files after the warm-up and at the end": f"{before.files}, {after.files}",
        "threads after the warm-up and at the end": f"{before.threads}, {after.threads}",
    }
    return [
        f"# A server under load, {date.today()}",
        "",
        f"`python -m benchmarks.serving_load --seconds {args.seconds:g} --clients {args.clients} --new-tokens "
        f"{args.new_tokens}`: `moma serve {args.model}` in float32 on a CPU, {args.clients} clients at once, answers "
        f"of {args.new_tokens} tokens at most. torch {torch.__version__}, {torch.get_num_threads()} thread, server "
        f"and clients on one machine. The counts are those of the {wall:.0f} s after the warm-up. Memory is what no "
        "file stands behind, taken when the server is idle.",
        "",
        "| | |",
        "|---|---:|",
        *[f"| {name} | {value} |" for name, value in rows.items()],
    ]


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.report:
        # before the measurement, whose report would be lost
        Path(args.report).mkdir(parents=True, exist_ok=True)
    asked = questions(args.model, args.new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with running_server(args.model, log) as (address, server):
            before, after, outcome, wall = asyncio.run(measure(args, address, server, asked))
        tracebacks = log.read_text().count("Traceback (most recent call last)")
    lines = report(args, before, after, outcome, wall)
    lines.append(f"| tracebacks in the log of the server | {tracebacks} |")
    print("\n".join(lines))
    if args.report:
        path = dated_file(Path(args.report), "serving-load-cpu")
        path.write_text("\n".join(lines) + "\n")
    faults = [*outcome.faults, *leaks(before, after)]
    faults += [f"{tracebacks} tracebacks in the log of the server"] if tracebacks else []
    for fault in faults[:50]:
        print(f"fault: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
