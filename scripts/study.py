# SPDX-License-Identifier: Apache-2.0
"""
Trains the study's grid of recipes, seeds and budgets, and adds a row to its results for each one that is finished.

    python scripts/study.py --work FOLDER --prepare      tokenizer, processor and tokens, once
    python scripts/study.py --work FOLDER --processes 2  train what the plan has and the results lack
    python scripts/study.py --work FOLDER --measure      measure finished branches again, from their checkpoints
    python scripts/study.py --work FOLDER --time         time a step of every recipe, with nothing else running
    python scripts/study.py --list                       what is finished and what is not

Everything resumes: a killed run goes on from its last checkpoint. Processes have one thread each. Checkpoints stay in
`--work`; what was measured goes to `--results`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from modeling_moma.utils.atomic_files import atomic_write
from modeling_moma.utils.hardware import keep_freed_memory
from study_recipe.grid import PLAN, Run
from study_recipe.preparing import prepare
from study_recipe.rows import add_row, has_row, read_rows
from study_recipe.training import Study, finished, forget, train_branch


REPOSITORY = Path(__file__).resolve().parent.parent
TIMES = REPOSITORY / "docs" / "study" / "step-times.json"
# of whose runs steps are timed
TIMED_SIZE, TIMED_SEED = "0.5M", 1
# what is done in place of training
MODES = ("list", "prepare", "measure", "time")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the tokens and the checkpoints, outside the repository")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "docs" / "study" / "runs.parquet")
    parser.add_argument("--recipe", type=Path, default=REPOSITORY / "recipes" / "study.yaml")
    parser.add_argument("--prepare", action="store_true", help="make tokenizer, processor and tokens")
    parser.add_argument("--measure", action="store_true", help="measure what has a row again")
    parser.add_argument("--time", action="store_true", help="time a training step of finished runs, in turns")
    parser.add_argument("--times", type=Path, default=TIMES, help="file of the times")
    parser.add_argument("--processes", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--minutes", type=float, help="begin no further branch after these")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="take these runs of the plan alone")
    selections = sorted({run.data for run in PLAN})
    parser.add_argument("--data", choices=selections, help="take the runs of this selection of the data alone")
    parser.add_argument("--up-to", type=int, metavar="M", help="take budgets of at most so many million tokens")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(arguments)
    if args.work is None and not args.list:
        parser.error("--work: give a folder for tokens and checkpoints")
    if args.processes < 1:
        parser.error(f"--processes {args.processes}: it must be at least 1")
    check_modes(parser, args)
    unknown = set(args.only or ()) - {run.name for run in PLAN}
    if unknown:
        parser.error(f"--only {min(unknown)!r}: the plan has no such run; --list names those that there are")
    if not chosen_runs(args):
        parser.error("--only, --data, --up-to: of the plan nothing is left; --list names runs with their budgets")
    return args


def check_modes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses two modes at once, and flags of the training that another mode would not read."""
    modes = [f"--{name}" for name in MODES if getattr(args, name)]
    if len(modes) > 1:
        parser.error(f"{modes[1]}: not together with {modes[0]}")
    if modes and args.processes > 1:
        parser.error(f"--processes {args.processes}: {modes[0]} takes one run after the other")
    if modes and args.minutes is not None:
        parser.error(f"--minutes {args.minutes:g}: {modes[0]} goes on to its end")


def chosen_runs(args: argparse.Namespace) -> list[Run]:
    """Return the runs of the plan that the flags ask for, with the budgets that they ask for."""
    runs = [
        replace(run, budgets=tuple(budget for budget in run.budgets if args.up_to is None or budget <= args.up_to))
        for run in PLAN
        if (not args.only or run.name in args.only) and args.data in (None, run.data)
    ]
    return [run for run in runs if run.budgets]


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    runs = chosen_runs(args)
    if args.list:
        for run in runs:
            done = [has_row(args.results, run.name, budget) for budget in run.budgets]
            budgets = ", ".join(f"{budget}M{' done' if is_done else ''}" for budget, is_done in zip(run.budgets, done))
            print(f"{run.name}: {budgets}")
        return 0
    study = Study(args.recipe, args.work / "processor", args.work / "tokens", args.work / "runs")
    if args.prepare:
        prepare(study, args.work, {run.data for run in runs})
        return 0
    if args.time:
        data = args.data or "all"
        return time_steps(study, [run for run in runs if run.data == data], args.times)
    if args.processes > 1:
        return start_processes(args, sys.argv[1:] if arguments is None else arguments)
    keep_freed_memory()
    if args.measure:
        if not any(has_row(args.results, run.name, budget) for run in runs for budget in run.budgets):
            print(f"--measure: --results {str(args.results)!r} has no row of these runs", file=sys.stderr)
            return 1
        for run in runs:
            measure_again(study, run, args.results)
        return 0
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    status = 0
    for run in runs:
        try:
            work_on(study, run, args.results, end)
        except Exception:
            # the other runs do not need this one
            traceback.print_exc()
            print(f"{run.name}: not finished", file=sys.stderr, flush=True)
            status = 1
    return status


def start_processes(args: argparse.Namespace, arguments: list[str]) -> int:
    """Start workers of one thread each; they take turns at what is left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, __file__, *arguments, "--processes", "1"]
    args.work.mkdir(parents=True, exist_ok=True)
    workers = []
    for number in range(args.processes):
        with (args.work / f"worker-{number}.log").open("a") as log:
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    # one that a signal ended has a negative status
    return int(any([worker.wait() != 0 for worker in workers]))


def work_on(study: Study, run: Run, results: Path, end: float | None) -> None:
    """Train the branches of a run that have no row yet, unless another process does."""
    # importing torch's training takes seconds, which --list and a wrong flag need not wait for
    from study_recipe.measuring import row

    (study.runs / run.name).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(study.runs / run.name / ".lock", timeout=0):
            for budget in sorted(run.budgets):
                if has_row(results, run.name, budget):
                    # a kill may have come between the row and this
                    forget(study, run, budget)
                    continue
                if end is not None and time.monotonic() > end:
                    return
                print(f"{run.name}: {budget} million tokens", flush=True)
                checkpoint = train_branch(study, run, budget)
                add_row(results, row(study, run, budget, checkpoint, REPOSITORY))
                forget(study, run, budget)
    except Timeout:
        print(f"{run.name}: another process is at it", flush=True)


def measure_again(study: Study, run: Run, results: Path) -> None:
    """Put new measurements of a run's finished budgets into their rows; what tells of the training stays."""
    from study_recipe.measuring import row

    rows = {old["budget"]: old for old in read_rows(results) if old["run"] == run.name}
    rows = {budget: rows[budget] for budget in run.budgets if budget in rows}
    for budget in sorted(rows):
        checkpoint = finished(study.runs / run.name / f"{budget}M", study.pace.steps(budget))
        if checkpoint is None:
            print(f"{run.name}: {budget} million tokens: its checkpoint is gone, and its row stays as it is")
            continue
        kept = {name: rows[budget][name] for name in ("seconds", "revision", "hardware")}
        add_row(results, {**row(study, run, budget, checkpoint, REPOSITORY), **kept})
        print(f"{run.name}: {budget} million tokens: measured again", flush=True)


def time_steps(study: Study, runs: list[Run], path: Path) -> int:
    """Write the seconds of a training step of every recipe that has a finished branch."""
    # torch reads it when it starts, so it has to be there before the processes that are measured
    os.environ["OMP_NUM_THREADS"] = "1"
    from study_recipe.measuring import hardware, revision
    from study_recipe.timing import ROUNDS, STEPS, step_seconds

    checkpoints = {}
    for run in runs:
        if (run.size, run.seed, run.rate) == (TIMED_SIZE, TIMED_SEED, 1.0):
            folders = [(study.runs / run.name / f"{budget}M", study.pace.steps(budget)) for budget in run.budgets]
            done = [checkpoint for folder, steps in folders if (checkpoint := finished(folder, steps))]
            if done:
                checkpoints[run] = done[-1]
    if not checkpoints:
        print(f"--time: {study.runs} has no finished branch of size {TIMED_SIZE}, seed {TIMED_SEED}", file=sys.stderr)
        return 1
    seconds = step_seconds(study, checkpoints)
    facts = {**hardware(), "threads": 1}
    content = {
        "size": TIMED_SIZE,
        "revision": revision(REPOSITORY),
        "hardware": facts,
        "rounds": ROUNDS,
        "steps": STEPS,
    }
    atomic_write(path, lambda aside: aside.write_text(json.dumps({**content, "seconds": seconds}, indent=1) + "\n"))
    print(f"{path}: {', '.join(seconds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
