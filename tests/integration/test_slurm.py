# SPDX-License-Identifier: Apache-2.0
"""The file for `sbatch` of docs/how-to/own-data.md, as a job of a Slurm that this test starts for itself."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.slow import slow
from helpers.tiny import write_training
from modeling_moma import MomaForCausalLM


ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
STEPS, SAVE_STEPS = 160, 40
PATIENCE = 120
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/slurm
CredType=auth/slurm
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
SwitchType=switch/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP
"""

pytestmark = [
    slow,
    pytest.mark.skipif(
        any(shutil.which(name) is None for name in PROGRAMS),
        reason="Slurm is not installed (apt-get install slurm-wlm)",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts jobs as root alone"),
]


def free_ports() -> list[int]:
    listeners = [socket.socket() for _ in range(2)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A controller and one node; gives what runs Slurm's commands."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.key").write_bytes(os.urandom(1024))
    (folder / "slurm.key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    text = CONFIG.format(host=host, folder=folder, ports=free_ports(), cores=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)

    def run(*words: str, cwd: Path = folder) -> str:
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    with daemon("slurmctld", folder, environment), daemon("slurmd", folder, environment):
        wait(lambda: "idle" in run("sinfo"), lambda: (folder / "slurmd.log").read_text())
        yield run


@contextmanager
def daemon(name: str, folder: Path, environment: dict[str, str]):
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen([name, "-D"], env=environment, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def wait(is_so, told) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, told()
        time.sleep(0.3)


def write_job(folder: Path) -> Path:
    """The file of the page, with one node of two processes and no GPU."""
    page = (ROOT / "docs" / "how-to" / "own-data.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, flags=re.DOTALL)
    for shown, small in (
        ("--nodes=4", "--nodes=1"),
        (" --gpus-per-node=8 --cpus-per-task=64", " --cpus-per-task=2"),
        ("--nproc-per-node 8", "--nproc-per-node 2"),
        ("runs/mixture/", ""),
    ):
        assert shown in script
        script = script.replace(shown, small)
    (folder / "job.sh").write_text(script)
    write_training(folder, num_experts={"text": 2, "image": 2})
    recipe = json.loads((folder / "recipe.json").read_text())
    numbers = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "save_total_limit": 99}
    recipe["trainer"] = {**numbers, "per_device_train_batch_size": 2}
    (folder / "mixture.yaml").write_text(json.dumps(recipe))
    return folder / "job.sh"


def test_a_job_goes_back_into_the_queue_and_goes_on_from_its_checkpoint(slurm, tmp_path):
    job = write_job(tmp_path)
    assert "to start at" in slurm("sbatch", "--test-only", str(job), cwd=tmp_path)
    number = slurm("sbatch", "--parsable", "--output", "out.txt", str(job), cwd=tmp_path).strip()

    def said() -> str:
        return (tmp_path / "out.txt").read_text(errors="replace")

    first = tmp_path / "model" / f"checkpoint-{SAVE_STEPS}" / "model.safetensors"
    wait(first.is_file, said)
    written = first.stat().st_mtime_ns
    # as Slurm does it two minutes before the time is over
    slurm("scancel", "--signal=TERM", "--batch", number)
    wait(lambda: "PENDING" in slurm("squeue", "-o", "%T"), said)
    # a job that goes back waits for two minutes
    slurm("scontrol", "update", f"jobid={number}", "StartTime=now")
    wait(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", number), said)
    assert "Restarts=1" in slurm("scontrol", "show", "job", number)
    state = json.loads((tmp_path / "model" / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS
    assert MomaForCausalLM.from_pretrained(tmp_path / "model").config.num_experts == {"text": 2, "image": 2}
    # what stood before was not trained again
    assert first.stat().st_mtime_ns == written
