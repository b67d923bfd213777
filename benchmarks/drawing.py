# SPDX-License-Identifier: Apache-2.0
"""
Images a second that a released model draws, in turns with the code of another commit.

    python -m benchmarks.drawing --against COMMIT --report benchmarks/reports

Each commit runs in a process of its own, from a checkout of its own, with its own copy of the model. The processes
take turns, so that only one of them works at a time; before anything is timed both have to draw the same images.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (
    "noto: red apple",
    "emojione: grinning face",
    "twemoji: blue car",
    "fluent: house with garden",
    "noto: cat",
    "emojione: green tree",
    "twemoji: pizza",
    "fluent: waving hand",
)


class Drawer:
    """
    A process that draws with one checkout's code.

    Args:
        checkout: a folder with the packages and the model.
        model: the model's folder in it.
        rows: images at once.
        dtype: of the weights.
        threads: of torch.
    """

    def __init__(self, checkout: Path, model: str, rows: int, dtype: str, threads: int):
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", "--model", str(checkout / model)]
        command += ["--rows", str(rows), "--dtype", dtype, "--threads", str(threads)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        self._process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def draw(self) -> tuple[float, str]:
        """Seconds of one batch, and what identifies its codes."""
        self._process.stdin.write("draw\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        if len(answer) != 2:
            raise RuntimeError("a drawing process ended; its message is above.")
        return float(answer[0]), answer[1]

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def checkout_of(commit: str | None) -> Iterator[Path]:
    """A folder with a commit's files; this one's without a commit."""
    if commit is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def serve(args: argparse.Namespace) -> None:
    """Draw one batch for each line on standard input; print the seconds and what identifies the codes."""
    import hashlib

    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor

    import modeling_moma  # noqa: F401

    torch.set_num_threads(args.threads)
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(args.rows)]
    inputs = processor(text=prompts, padding=True, padding_side="left", return_tensors="pt")
    for _ in sys.stdin:
        began = time.perf_counter()
        ids = model.generate(**inputs, generation_mode="image", do_sample=False)
        codes = model.decode_image_tokens(ids)
        seconds = time.perf_counter() - began
        print(f"{seconds:.6f} {hashlib.sha256(codes.numpy().tobytes()).hexdigest()[:16]}", flush=True)


def compare(args: argparse.Namespace) -> tuple[list[list[float]], bool]:
    """Seconds of every round, ours first, and whether both drew the same."""
    with checkout_of(None) as here, checkout_of(args.against) as there:
        drawers = [Drawer(each, args.model, args.rows, args.dtype, args.threads) for each in (here, there)]
        try:
            first = [drawer.draw()[1] for drawer in drawers]
            times: list[list[float]] = [[], []]
            for number in range(args.rounds):
                # each begins in turn
                turns = list(zip(drawers, times))
                for drawer, own in turns if number % 2 else turns[::-1]:
                    own.append(drawer.draw()[0])
        finally:
            for drawer in drawers:
                drawer.close()
    return times, first[0] == first[1]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def report(args: argparse.Namespace, times: list[list[float]], is_same: bool) -> str:
    """A page of one comparison."""
    rates = [args.rows / statistics.median(own) for own in times]
    ratio = statistics.median(other / mine for mine, other in zip(*times))
    commit = git("rev-parse", "--short", args.against)
    # with what is not committed
    own = git("describe", "--always", "--dirty")
    return "\n".join(
        [
            f"# Drawing, {date.today()}",
            "",
            f"`python -m benchmarks.drawing --against {commit} --rows {args.rows} --dtype {args.dtype} --threads "
            f"{args.threads}`: {args.model}, greedy, processes in turn, medians of {args.rounds} rounds. "
            + ("Both draw the same codes." if is_same else "**The two draw other codes.**"),
            "",
            "| code | images a second |",
            "|---|---:|",
            f"| this, {own} | {rates[0]:.3f} |",
            f"| {commit} | {rates[1]:.3f} |",
            "",
            f"This draws {ratio:.2f} times as many.",
            "",
        ]
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drawing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--model", default="model_cards/moma-emoji", help="a folder in both checkouts")
    parser.add_argument("--rows", type=int, default=16, help="images at once")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--report", type=Path, help="folder for a dated report")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not args.serve and args.against is None:
        parser.error("--against is missing: name the commit to compare with")
    for name in ("rows", "threads", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: it must be at least 1")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.serve:
        serve(args)
        return 0
    if args.report:
        # before the measurement, whose report would be lost
        args.report.mkdir(parents=True, exist_ok=True)
    times, is_same = compare(args)
    page = report(args, times, is_same)
    print(page)
    if args.report:
        # not above, since a process that draws has another checkout's packages
        from benchmarks.speed.results import dated_file

        dated_file(args.report, "drawing-cpu").write_text(page)
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
