# SPDX-License-Identifier: Apache-2.0
"""Shards as tasks of Ray: what one process writes, after killed workers, Ctrl-C and nodes that die as well."""

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from datasets import Dataset, Features, Image, Value

from helpers.forked_python import run_python
from helpers.processes import start_process
from helpers.server_process import free_port
from helpers.slow import slow
from helpers.tiny import noise_images, tiny_processor
from modeling_moma.cli import tokenize
from modeling_moma.cli.main import main
from modeling_moma.data.jobs import read_job
from modeling_moma.data.ray_tasks import OBJECT_STORE_BYTES, write_shard
from modeling_moma.utils.atomic_files import LEFT_OVER


ROOT = Path(__file__).resolve().parents[2]
# Ray is imported by processes of their own alone: what it listens on is decided by then
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed")
# a worker writes a shard in about half a second, so that there is one to kill
ROWS, SHARDS = 512, 6
# longest wait for something that takes half a minute on a quiet machine, and minutes beside other tests
PATIENCE = 240


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A recipe of several shards, its processor, and in `one` what one process makes of them."""
    folder = tmp_path_factory.mktemp("ray")
    tiny_processor().save_pretrained(folder / "processor")
    number = ROWS * SHARDS
    rows = {"image": noise_images(number), "label": [f"thing {index}" for index in range(number)]}
    features = Features({"image": Image(), "label": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    (folder / "recipe.yaml").write_text(
        f"sources: {{many: {{data: {folder}/train.parquet, image: image, text: label, held_out: 0}}}}\n"
    )
    tokenize.main(command(folder, folder / "one", "--processes", "1"))
    return folder


def command(folder, output, *options):
    given = ["--processor", str(folder / "processor"), "--output", str(output), "--rows-per-shard", str(ROWS)]
    return [str(folder / "recipe.yaml"), *given, *options]


def start(folder, output, *options, **variables):
    """`moma tokenize --engine ray` in a process of its own; what it prints is in `log.txt` beside its output."""
    given = command(folder, output, "--engine", "ray", "--processes", "2", *options)
    return start_process(run_command, ["tokenize", *given], output.parent / "log.txt", environment(**variables))


def run_command(arguments, log, variables):
    """What such a process does."""
    os.environ.update(variables)
    with open(log, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.exit(main(arguments))


def environment(**variables):
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, **variables}


def finish(process, output):
    process.join(PATIENCE)
    return process.exitcode, (output.parent / "log.txt").read_text()


def code_of(process):
    """The status of a process that has ended."""
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def wait_for(what, process):
    """What a function returns, once that is something."""
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends and code_of(process) is None:
        if found := what():
            return found
        time.sleep(0.005)
    raise AssertionError(f"nothing came in time, or the command ended before it did: {code_of(process)}")


def workers(process):
    """The processes that write shards, and the file that each has begun."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    found = []
    for child in children:
        try:
            files = [Path(file.path) for file in child.open_files() if file.path.endswith(LEFT_OVER)]
            files = [file for file in files if ".arrow." in file.name]
        except psutil.Error:
            continue
        found += [(child, file) for file in files]
    return found


def held(process):
    """As [`workers`], the first of them stopped in the middle of its shard."""
    found = workers(process)
    if found:
        found[0][0].suspend()
        if found[0][1].exists():
            return found
        found[0][0].resume()
    return []


def reports(output):
    return {path: path.stat().st_mtime_ns for path in output.glob("many/*.json")}


def contents(output):
    # what a killed worker has left is in nobody's way
    paths = [path for path in sorted(output.rglob("*")) if path.is_file() and not path.name.endswith(LEFT_OVER)]
    return {path.relative_to(output): path.read_bytes() for path in paths}


def gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=20)
    return not alive


@needs_ray
@pytest.mark.timeout(3 * PATIENCE)
def test_a_killed_worker_costs_its_shard_alone(place, tmp_path):
    output = tmp_path / "tokens"
    # one shard is there, whoever has written it
    (output / "many").mkdir(parents=True)
    shutil.copy2(place / "one" / "job.json", output)
    for path in (place / "one" / "many").glob("train-00000-*"):
        shutil.copy2(path, output / "many")
    # of another the report alone
    orphan = shutil.copy2(place / "one" / "many" / f"train-00001-of-{SHARDS:05}.json", output / "many")
    process = start(place, output)
    # before a shard is done: asking takes so long that the others might be done after it
    wait_for(lambda: listening(process), process)
    addresses = listening(process)
    assert all(address.rpartition(":")[2] == "127.0.0.1" for address in addresses), addresses
    wait_for(lambda: len(reports(output)) > 2, process)
    (killed, lost), *others = wait_for(lambda: held(process), process)
    killed.kill()
    # a file that is renamed stays the same one
    kept = {file: file.stat().st_ino for _, file in others if file.exists()}
    done = reports(output)
    del done[Path(orphan)]
    assert output / "many" / final(lost).replace(".arrow", ".json") not in done
    everything = psutil.Process(process.pid).children(recursive=True)
    seen = {killed.pid}
    while code_of(process) is None:
        seen |= {child.pid for child, _ in workers(process)}
        time.sleep(0.02)
    code, said = finish(process, output)
    assert code == 0 and f"| many, train | {ROWS * SHARDS:,} |" in said, said
    assert "Traceback" not in said and "Loading weights" not in said.partition("write_shard")[2], said
    assert contents(output) == contents(place / "one")
    assert {path: moment for path, moment in reports(output).items() if path in done} == done
    for file, number in kept.items():
        assert (output / "many" / final(file)).stat().st_ino == number
    # two, and one in place of that which was killed: none is started for each shard
    assert len(seen) <= 3
    assert gone(everything)


def final(aside):
    """Name of the file that one aside becomes."""
    return aside.name.removeprefix(".").partition(".arrow")[0] + ".arrow"


@needs_ray
@slow
def test_ctrl_c_leaves_no_process_and_the_folder_goes_on(place, tmp_path):
    output = tmp_path / "tokens"
    process = start(place, output)
    wait_for(lambda: reports(output), process)
    everything = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    code, said = finish(process, output)
    assert code == 130 and "stopped. The shards that are done are whole." in said, said[-3000:]
    assert gone(everything)
    done = reports(output)
    assert 0 < len(done) < SHARDS
    tokenize.main(command(place, output, "--processes", "1"))
    assert contents(output) == contents(place / "one")
    assert {path: moment for path, moment in reports(output).items() if path in done} == done


def listening(process):
    """Addresses that the raylet and what stands beside it listen on, once the raylet is there."""
    family = psutil.Process(process.pid).children(recursive=True)
    is_there = any("raylet" in name_of(child) for child in family)
    found = [one.laddr.ip for child in family for one in connections(child) if one.status == "LISTEN"]
    return found if is_there else []


def name_of(process):
    try:
        return process.name()
    except psutil.Error:
        return ""


def connections(process):
    try:
        return process.net_connections("tcp")
    except psutil.Error:
        return []


def start_node(*options, **variables):
    """`ray start`: a node of one core, in a process of its own and its children."""
    ray = str(Path(sys.executable).with_name("ray"))
    given = [ray, "start", "--block", "--num-cpus", "1", "--object-store-memory", str(OBJECT_STORE_BYTES), *options]
    return subprocess.Popen(given, env=environment(**variables), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def raylets(node):
    return [child for child in psutil.Process(node.pid).children() if "raylet" in child.name()]


@needs_ray
@slow
def test_a_node_that_dies_costs_its_shard_alone(place, tmp_path):
    output, address = tmp_path / "tokens", f"127.0.0.1:{free_port()}"
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    head = start_node("--head", "--port", address.partition(":")[2], "--include-dashboard=false", **variables)
    nodes = [head]
    try:
        # a node that finds no head gives up
        wait_for(lambda: raylets(head), head)
        node = start_node("--address", address, **variables)
        nodes.append(node)
        wait_for(lambda: raylets(node), node)
        process = start(place, output, "--address", address, **variables)
        wait_for(lambda: reports(output), process)
        (_, lost), *_ = wait_for(lambda: held(node), process)
        done = reports(output)
        for child in psutil.Process(node.pid).children(recursive=True):
            child.kill()
        code, said = finish(process, output)
        assert code == 0, said
        assert contents(output) == contents(place / "one")
        assert {path: moment for path, moment in reports(output).items() if path in done} == done
        assert output / "many" / final(lost).replace(".arrow", ".json") not in done
    finally:
        everything = [child for one in nodes for child in psutil.Process(one.pid).children(recursive=True)]
        for child in [*nodes, *everything]:
            with contextlib.suppress(psutil.Error):
                child.kill()
        for one in nodes:
            one.wait()
        assert gone(everything)


# each in a process of its own, which Ray's workers have code of by value
RUN = """
import os, sys
from modeling_moma.cli.main import main
from modeling_moma.data import ray_tasks
{change}
sys.exit(main(sys.argv[1:]))
"""


@needs_ray
@slow
@pytest.mark.parametrize(
    "change, message",
    [
        ("", "sources: 'lines', split 'train', row 1: text empty.*--strict"),
        (
            "ray_tasks.RETRIES = 1; ray_tasks.write_shard = lambda *given: os._exit(1)",
            "--output 'tokens': the worker of the shard 'lines/train-00000-of-00001.json' died 2 times.*--processes",
        ),
    ],
    ids=["an error", "the death of every worker"],
)
def test_what_becomes_of_a_shard_is_told_in_one_line(place, tmp_path, change, message):
    (tmp_path / "lines.txt").write_text("a\n\nb\n")
    # a path that starts from where the command is given
    (tmp_path / "recipe.yaml").write_text("sources: {lines: {data: lines.txt, text: text, held_out: 0}}\n")
    given = ["tokenize", "recipe.yaml", "--processor", str(place / "processor"), "--output", "tokens", "--strict"]
    command = ["-c", RUN.format(change=change), *given, "--engine", "ray", "--processes", "1"]
    done = run_python(command, cwd=tmp_path, env=environment(), timeout=PATIENCE)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(f"^error: {message}", done.stderr, re.M), done.stderr


def test_a_node_without_the_shared_disk_is_told_of(place, tmp_path):
    task = read_job(place / "one").tasks()[0]
    with pytest.raises(
        ValueError, match=r"--output '/nowhere/tokens': the node '.*' has no '/nowhere/tokens/job.json'"
    ):
        write_shard(task, "/nowhere/tokens", str(tmp_path), strict=False, threads=1)
    with pytest.raises(ValueError, match="has no '/nowhere'.*a disk that all nodes of the Ray cluster share"):
        write_shard(task, str(place / "one"), "/nowhere", strict=False, threads=1)


@needs_ray
@pytest.mark.parametrize("by", ["--address", "RAY_ADDRESS"])
def test_a_cluster_that_does_not_answer_is_told_of(place, tmp_path, monkeypatch, by):
    address = f"127.0.0.1:{free_port()}"
    options = ["--address", address] if by == "--address" else []
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1" if options else address)
    with pytest.raises(ValueError, match=rf"--address '{address}': no Ray cluster can be joined.*refused.*ray start"):
        tokenize.main(command(place, tmp_path / "tokens", "--engine", "ray", *options))


def test_an_address_is_of_ray_alone(capsys):
    with pytest.raises(SystemExit):
        tokenize.parse_arguments(["r", "--processor", "p", "--output", "o", "--address", "auto"])
    assert "--address 'auto' is that of a Ray cluster: give --engine ray" in capsys.readouterr().err
