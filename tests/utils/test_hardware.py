# SPDX-License-Identifier: Apache-2.0
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments
from transformers.utils import logging

from helpers.tiny import tiny_model
from modeling_moma import MomaMetricsCallback
from modeling_moma.utils.hardware import keep_freed_memory, on_one_gpu


# pages that 64 MiB ask for, again and again
SCRIPT = """
import resource, sys, torch
from modeling_moma.utils.hardware import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.zeros(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is another's")


def run(monkeypatch, argument: str, **environment) -> tuple[str, int]:
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", SCRIPT, argument]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return answer[0], int(answer[1])


@needs_glibc
def test_freed_memory_is_taken_again(monkeypatch):
    # unless pages are huge
    assert run(monkeypatch, "plain")[1] > 50
    kept, pages = run(monkeypatch, "keep")
    assert kept == "True" and pages < 50


@needs_glibc
def test_what_the_environment_sets_stays(monkeypatch):
    assert run(monkeypatch, "keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


# pages that the last steps of a training ask for, with the callback or without what it keeps
TRAINING = """
import resource, sys, tempfile
from transformers import Trainer, TrainerCallback, TrainingArguments
from helpers.tiny import tiny_model
from modeling_moma import MomaMetricsCallback

class Faults(TrainerCallback):
    seen = []
    def on_step_end(self, *rest, **kwargs):
        self.seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

model = tiny_model(hidden_size=256, intermediate_size=512)
ids = [[1, *[30 + place % 9 for place in range(40)]]] * 64
arguments = TrainingArguments(
    tempfile.mkdtemp(), max_steps=14, per_device_train_batch_size=64, report_to=[], use_cpu=True, disable_tqdm=True
)
callbacks = [MomaMetricsCallback(keep_freed_memory=sys.argv[1] == "keep"), Faults()]
data = [{"input_ids": row, "labels": row} for row in ids]
Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()
# the first steps fill what is kept, and a few alone may come upon free pages
print(Faults.seen[-1] - Faults.seen[5])
"""


@needs_glibc
def test_a_trainer_keeps_freed_memory_by_the_callback(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    pages = {}
    for way in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", TRAINING, way], check=True, stdout=subprocess.PIPE, text=True)
        pages[way] = int(done.stdout.splitlines()[-1])
    assert pages["keep"] < pages["leave"] / 2, pages


@pytest.fixture
def two_gpus(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, per_device_train_batch_size=3)
    arguments._n_gpu = 2
    assert arguments.train_batch_size == 6
    return arguments


def test_one_process_trains_on_one_gpu_and_says_how_all_are_taken(two_gpus, monkeypatch):
    said = []
    monkeypatch.setattr(
        logging.get_logger("modeling_moma.utils.hardware"), "warning", lambda message: said.append(message)
    )
    assert on_one_gpu(two_gpus) is two_gpus
    assert two_gpus.n_gpu == 1 and two_gpus.train_batch_size == 3
    assert "`torchrun --nproc-per-node 2 -m modeling_moma`" in said[0]
    assert on_one_gpu(two_gpus).n_gpu == 1 and len(said) == 1


def test_several_gpus_of_one_process_are_refused(two_gpus):
    with pytest.raises(ValueError, match="n_gpu = 2.*torchrun"):
        MomaMetricsCallback().on_train_begin(two_gpus, None, None, model=None)


def test_no_copies_of_routers_are_trained():
    model = tiny_model()
    replicas = [module for module in model.modules() if not any(module.children())]
    with pytest.raises(ValueError, match="DataParallel.*torchrun"):
        for module in replicas:
            module._replicate_for_data_parallel()
    model.eval()
    assert all(module._replicate_for_data_parallel()._is_replica for module in model.modules())
