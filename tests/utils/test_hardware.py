# SPDX-License-Identifier: Apache-2.0
import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments
from transformers.utils import logging

from modeling_moma import MomaMetricsCallback, cpu_moma
from modeling_moma.training.trainer_settings import OneGpuArguments
from modeling_moma.utils.hardware import keep_freed_memory, trains_in_bf16


# pages that 64 MiB ask for, again and again, and the last steps of a training, before and after freed memory is kept
SCRIPT = """
import os, resource, tempfile, torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from helpers.tiny import tiny_model
from modeling_moma import MomaMetricsCallback
from modeling_moma.utils.hardware import keep_freed_memory

def asked():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def of_tensors():
    torch.zeros(2**24)
    before = asked()
    for _ in range(5):
        torch.zeros(2**24)
    return asked() - before

class Faults(TrainerCallback):
    def __init__(self):
        self.seen = []
    def on_step_end(self, *rest, **kwargs):
        self.seen.append(asked())

def of_training(keep):
    faults, ids = Faults(), [[1, *[30 + place % 9 for place in range(40)]]] * 16
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=8, per_device_train_batch_size=16, report_to=[], use_cpu=True, disable_tqdm=True
    )
    callbacks = [MomaMetricsCallback(keep_freed_memory=keep), faults]
    data = [{"input_ids": row, "labels": row} for row in ids]
    model = tiny_model(hidden_size=256, intermediate_size=512)
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()
    # the first steps fill what is kept, and a few alone may come upon free pages
    return faults.seen[-1] - faults.seen[3]

# what is kept once stays so for a process
if os.fork() == 0:
    print(of_tensors(), keep_freed_memory(), of_tensors(), flush=True)
    os._exit(0)
os.wait()
print(of_training(False), of_training(True))
"""
# what makes an allocator another than that of a plain start
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is another's")


@pytest.fixture(scope="module")
def measured():
    """What is said of the tensors, and of the trainings."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, Path(__file__).resolve().parents[1:3]))
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    tensors, *_, trainings = (line.split() for line in done.stdout.splitlines())
    return tensors, trainings


@needs_glibc
def test_freed_memory_is_taken_again(measured):
    plain, kept, pages = measured[0]
    # unless pages are huge
    assert int(plain) > 50
    assert kept == "True" and int(pages) < 50


@needs_glibc
def test_a_trainer_keeps_freed_memory_by_the_callback(measured):
    left, kept = map(int, measured[1])
    assert kept < left / 2


@pytest.mark.parametrize("name", VARIABLES[:3])
def test_what_the_environment_sets_stays(monkeypatch, name):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("the allocator is set"))
    monkeypatch.setenv(name, "131072")
    assert keep_freed_memory() is False


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


@pytest.fixture
def two_gpus(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, per_device_train_batch_size=3)
    arguments._n_gpu = 2
    assert arguments.train_batch_size == 6
    return arguments


def test_one_process_trains_on_one_gpu_and_says_how_all_are_taken(two_gpus, monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("modeling_moma.training.trainer_settings"), "warning", said.append)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    own = OneGpuArguments(two_gpus.output_dir, report_to=[], use_cpu=True, per_device_train_batch_size=3)
    assert own.n_gpu == 1 and own.train_batch_size == 3
    assert len(said) == 1 and "`torchrun --nproc-per-node 2 -m modeling_moma`" in said[0]


def test_several_gpus_of_one_process_are_refused(two_gpus):
    with pytest.raises(ValueError, match="n_gpu = 2.*torchrun"):
        MomaMetricsCallback().on_train_begin(two_gpus, None, None, model=None)


@pytest.mark.parametrize(
    ("cpu", "max_isa", "expected"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, None, True),
        # matrix units that are there and may not be used
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "AVX512_CORE_BF16", False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, None, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, None, False),
        ({"architecture": "aarch64", "bf16": True}, None, True),
    ],
)
def test_a_cpu_trains_in_bf16_where_it_is_faster_by_that(cpu, max_isa, expected, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: cpu)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if max_isa is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", max_isa)
    asked = (cpu_moma.has_instructions, cpu_moma.multiplies_with)
    for question in asked:
        question.cache_clear()
    try:
        assert trains_in_bf16("auto", "cpu") is expected
        assert trains_in_bf16("on", "cpu") and not trains_in_bf16("off", "cpu")
    finally:
        for question in asked:
            question.cache_clear()
