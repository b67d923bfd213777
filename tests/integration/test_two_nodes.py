# SPDX-License-Identifier: Apache-2.0
"""Training on two nodes, which are network namespaces, by the commands of docs/how-to/scaling.md."""

import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers.mixture import write_mixture
from helpers.parallel_reference import MODELS, SEED, assert_steps_equal, single_process
from helpers.processes import start_scripts
from helpers.slow import slow
from helpers.tiny import tiny_model, tiny_processor, trainer_flags
from helpers.two_node_training import BATCHES, LAYOUTS, NAMES
from helpers.two_nodes import SECONDS, two_nodes, wait_for
from modeling_moma.cli import pretrain, tokenize
from modeling_moma.training.checkpoints import WHOLE, check_kind


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
HELPERS = ROOT / "tests" / "helpers"
# `moma pretrain`, and the same on CPUs under FSDP2, which Accelerate leaves to accelerators
PRETRAIN, SHARDED_PRETRAIN = ["-m", "modeling_moma", "pretrain"], [str(HELPERS / "fsdp2.py")]
PYTHONPATH = os.pathsep.join(str(ROOT / name) for name in (".", "scripts", "tests"))


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as nodes:
        yield nodes


def torchrun(nodes, node, processes=1):
    """The command that a node starts, but for what it runs."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", f"{nodes.addresses[0]}:29500"]
    meeting += ["--rdzv-conf", f"is_host={'true' if node == 0 else 'false'},join_timeout=120"]
    size = ["--nnodes", "2", "--nproc-per-node", str(processes), "--local-addr", nodes.addresses[node]]
    return [sys.executable, "-m", "torch.distributed.run", *size, *meeting]


def accelerate(nodes, node, config="ddp"):
    """As [`torchrun`], by Accelerate, which hands on what stands in PET_LOCAL_ADDR."""
    machines = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(node)]
    machines += ["--main_process_ip", nodes.addresses[0], "--main_process_port", "29500", "--rdzv_backend", "c10d"]
    machines += ["--rdzv_conf", f"is_host={'true' if node == 0 else 'false'}", "--mixed_precision", "no"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    launch += ["--num_cpu_threads_per_process", "1"]
    return ["env", f"PET_LOCAL_ADDR={nodes.addresses[node]}", sys.executable, *launch, *machines]


def run_on_both(nodes, folder, command, *work):
    """Run the same work on both nodes, and wait until it has ended well."""
    logs = [folder / f"node-{node}.log" for node in range(2)]
    processes = [
        nodes.start(node, [*command(node), *work], log, {"PYTHONPATH": PYTHONPATH}) for node, log in enumerate(logs)
    ]
    wait_for(processes, logs)


@slow
@pytest.mark.parametrize("processes", [1, 2])
def test_layouts_of_two_nodes_equal_one_process_with_every_batch(nodes, tmp_path, processes):
    for name in NAMES:
        tiny_model(seed=SEED, **MODELS[name]).save_pretrained(tmp_path / name)
    script = str(HELPERS / "two_node_training.py")
    run_on_both(nodes, tmp_path, lambda node: torchrun(nodes, node, processes), script, str(tmp_path))
    for name in NAMES:
        single = single_process(name, [step[: 2 * processes] for step in BATCHES])
        for layout in LAYOUTS[2 * processes]:
            results = [torch.load(tmp_path / f"{layout}-{rank}.pt") for rank in range(2 * processes)]
            assert [result["node"] for result in results] == ["0"] * processes + ["1"] * processes
            for rank, result in enumerate(results):
                assert_steps_equal(result[name], single["steps"], rank)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A mixture of captions, documents and texts, with its tokens and their processor."""
    folder = tmp_path_factory.mktemp("mixture")
    tiny_processor().save_pretrained(folder / "processor")
    recipe = write_mixture(folder / "data")
    paths = ["--processor", str(folder / "processor"), "--output", str(folder / "tokens")]
    tokenize.main([str(recipe), *paths, "--processes", "1"])
    return folder


def history(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


# a launcher, and what its checkpoints are under FSDP; by torchrun, under DDP, nodes die below
LAUNCHERS = [
    pytest.param(torchrun, None, id="torchrun", marks=slow),
    pytest.param(accelerate, None, id="ddp", marks=slow),
    pytest.param(partial(accelerate, config="fsdp2"), WHOLE, id="fsdp2"),
]


@pytest.mark.parametrize(("launcher", "kind"), LAUNCHERS)
def test_pre_training_on_two_nodes_equals_one_process_that_accumulates(launcher, kind, nodes, inputs, tmp_path):
    def arguments(output, **more):
        paths = [text for name in ("processor", "tokens") for text in (f"--{name}", str(inputs / name))]
        numbers = {"max_steps": 3, "per_device_train_batch_size": 2, "eval_steps": 3, "save_steps": 3}
        flags = trainer_flags(**numbers, logging_steps=1, bf16=False, **more)
        return [*paths, str(inputs / "data" / "recipe.yaml"), "--output", str(tmp_path / output), *flags]

    work = PRETRAIN if kind is None else SHARDED_PRETRAIN
    run_on_both(nodes, tmp_path, lambda node: launcher(nodes, node), *work, *arguments("two"))
    check_kind(tmp_path / "two" / "checkpoint-3", kind)
    pretrain.main(arguments("one", gradient_accumulation_steps=2))
    for two, one in zip(history(tmp_path / "two"), history(tmp_path / "one"), strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), (key, one["step"])
    two, one = (load_file(tmp_path / output / "model.safetensors") for output in ("two", "one"))
    assert any(key.endswith("threshold") for key in one)
    for key, value in one.items():
        # an accumulated batch counts as two steps for the cuts, a batch in two parts as one
        if not key.endswith(("threshold", "num_updates")):
            torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-5, msg=key)


# on every node, so that whatever ends a training begins it anew
FOREVER = ["bash", "-c", 'until "$@"; do sleep 1; done', "forever"]
# the node that all meet at, the cable between them, the other node, a process alone
EVENTS = ("host", "cable", "node", "process")
# so many of them, one after the other
NUM_EVENTS = int(os.environ.get("NODE_FAILURES", "1"))
# seconds that one process waits for another, and that the cable is cut; a cut that is shorter is not noticed
PATIENCE, CUT = 15, 20


class FailingNodes:
    """A training on two nodes to which things happen."""

    def __init__(self, nodes, inputs, folder):
        self.nodes, self.output, self.folder = nodes, folder / "killed", folder
        recipe = yaml.safe_load((inputs / "data" / "recipe.yaml").read_text())
        recipe["trainer"]["ddp_timeout"] = PATIENCE
        recipe["samples"]["every"] = 0
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        self.paths = [text for name in ("processor", "tokens") for text in (f"--{name}", str(inputs / name))]
        self.running = [None, None]

    def arguments(self, output):
        steps = str(8 * NUM_EVENTS + 8)
        sizes = trainer_flags(max_steps=steps, per_device_train_batch_size=2, eval_steps=steps, save_steps=1)
        given = [str(self.folder / "recipe.yaml"), *self.paths, "--output", str(output), *sizes]
        return [*given, *trainer_flags(logging_steps=1, bf16=False), "--resume"]

    def start(self, node):
        command = torchrun(self.nodes, node)
        work = [*FOREVER, *command, "-m", "modeling_moma", "pretrain", *self.arguments(self.output)]
        self.running[node] = self.nodes.start(node, work, self.folder / f"node-{node}.log")

    def kill(self, node):
        os.killpg(self.running[node].pid, signal.SIGKILL)
        self.running[node].wait()

    def kill_process(self, node):
        # the launcher's child, which trains
        for child in psutil.Process(self.running[node].pid).children(recursive=True):
            if "pretrain" in child.cmdline() and "torch.distributed.run" not in child.cmdline():
                child.kill()

    def step(self):
        numbers = [int(path.name.split("-")[1]) for path in self.output.glob("checkpoint-*")]
        return max(numbers, default=0)

    def wait_for_steps(self, more):
        reached, until = self.step() + more, time.monotonic() + SECONDS
        while self.step() < reached:
            assert time.monotonic() < until, self.logs()
            time.sleep(0.01)

    def logs(self):
        return "\n".join((self.folder / f"node-{node}.log").read_text()[-3000:] for node in range(2))

    def happen(self, event):
        if event == "process":
            self.kill_process(1)
        elif event == "cable":
            self.nodes.drop_packets(True)
            time.sleep(CUT)
            self.nodes.drop_packets(False)
        else:
            node = 1 if event == "node" else 0
            self.kill(node)
            self.start(node)


def test_training_goes_on_whatever_happens_to_a_node(nodes, inputs, tmp_path):
    training, moments = FailingNodes(nodes, inputs, tmp_path), random.Random(0)
    try:
        for node in range(2):
            training.start(node)
        for index in range(NUM_EVENTS):
            training.wait_for_steps(2)
            time.sleep(moments.uniform(0, 0.3))
            training.happen(EVENTS[index % len(EVENTS)])
        codes = [process.wait(SECONDS) for process in training.running]
    finally:
        for node in range(2):
            if training.running[node].poll() is None:
                training.kill(node)
    assert codes == [0, 0], training.logs()
    # what never failed, on one machine
    whole = tmp_path / "whole"
    for process in start_scripts(pretrain.main, training.arguments(whole), tmp_path / "whole.log"):
        process.join(SECONDS)
        assert process.exitcode == 0, (tmp_path / "whole.log").read_text()[-3000:]
    losses, expected = (
        [entry["loss"] for entry in history(folder) if "loss" in entry] for folder in (training.output, whole)
    )
    assert len(losses) == 8 * NUM_EVENTS + 8 and losses == pytest.approx(expected, abs=1e-5)
