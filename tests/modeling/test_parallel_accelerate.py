# SPDX-License-Identifier: Apache-2.0
"""The files of configs/accelerate, with Accelerate's own code and as far as CPUs go."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.dataclasses import get_module_class_from_name
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from helpers.fsdp2 import CONFIG_FOLDER, fsdp_accelerator, launch_arguments
from helpers.parallel_reference import (
    MIXED,
    MODELS,
    SEED,
    TWO_BATCHES,
    assert_steps_equal,
    buffers_of,
    sgd,
    single_process,
    train,
    unwrapped,
)
from helpers.processes import CRASH_SIGNALS, CRASHES, run_group
from helpers.server_process import free_port
from helpers.slow import slow
from helpers.tiny import tiny_config, tiny_model, trainer_flags, write_training
from modeling_moma import MomaForCausalLM
from modeling_moma.cli import pretrain
from modeling_moma.modeling_moma import MomaDecoderLayer


CONFIGS = sorted(CONFIG_FOLDER.glob("*.yaml"))
BF16_STEPS = 3
# each has layers without depth, too
SHARDED = {name: MODELS[name] for name in ("depth", "uneven")}
IN_BF16 = {name: MODELS[name] for name in ("4t4i", "uneven")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_field(path):
    config = ClusterConfig.from_yaml_file(path)
    known = vars(launch_command_parser().parse_args(["train.py"]))
    # it takes unknown names in these two without a word
    for name in (*config.fsdp_config, *config.deepspeed_config):
        assert name in known, name
    arguments = launch_arguments(path)
    assert (arguments.mixed_precision, arguments.num_processes) == ("bf16", 8)
    kinds = {"ddp": "multi_gpu", "fsdp2": "use_fsdp", "deepspeed_zero3": "use_deepspeed"}
    assert getattr(arguments, kinds[path.stem])


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_several_machines_meet_by_c10d_at_the_first_one(name):
    path = CONFIG_FOLDER / f"{name}.yaml"
    machines = "--num_machines 2 --machine_rank 1 --main_process_ip first --main_process_port 29500".split()
    arguments = launch_arguments(path, *machines, "--rdzv_backend", "c10d")
    assert (arguments.rdzv_backend, arguments.num_machines, arguments.machine_rank) == ("c10d", 2, 1)
    prepare_multi_gpu_env(arguments)
    # without an endpoint each machine would wait for itself
    assert (arguments.rdzv_endpoint, arguments.nproc_per_node) == ("first:29500", "4")
    # one machine needs none of it
    assert launch_arguments(path).rdzv_backend == "static"


@pytest.mark.parametrize("name", ["4t4i", "depth"])
def test_named_classes_are_in_the_model(name):
    model = tiny_model(seed=SEED, **MODELS[name])
    names = []
    for path in CONFIGS:
        config = ClusterConfig.from_yaml_file(path)
        names.append(config.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap"))
        names.append(config.deepspeed_config.get("deepspeed_moe_layer_cls_names"))
    names = [each for text in names if text for each in text.split(",")]
    assert len(names) == 2
    for each in names:
        assert get_module_class_from_name(model, each) is not None, each


def fsdp2_work(rank, folder, overrides):
    """One process trains in fp32, in shards."""
    results = {}
    for name in SHARDED:
        accelerator = fsdp_accelerator(rank, 2, {**overrides, "ACCELERATE_MIXED_PRECISION": "no"})
        model = MomaForCausalLM.from_pretrained(folder / name).train()
        model, optimizer = accelerator.prepare(model, sgd(model))
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        # from Accelerate 1.16 on the unit of a layer that is checkpointed is what is around it
        layers = {getattr(module, "_checkpoint_wrapped_module", module) for module in units}
        results[name] = {
            "steps": train(model, optimizer, [step[rank] for step in TWO_BATCHES], accelerator.backward),
            "layers": sum(isinstance(module, MomaDecoderLayer) for module in layers),
            "state": accelerator.get_state_dict(model),
        }
    torch.save(results, folder / f"{rank}.pt")


@pytest.mark.parametrize("checkpointing", [pytest.param("false", marks=slow), "true"])
def test_fsdp2_equals_a_single_process(checkpointing, tmp_path):
    for name, fields in SHARDED.items():
        tiny_model(seed=SEED, **fields).save_pretrained(tmp_path / name)
    run_group(fsdp2_work, tmp_path, {"FSDP_ACTIVATION_CHECKPOINTING": checkpointing})
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in SHARDED:
        single = single_process(name, TWO_BATCHES)
        for rank, result in enumerate(results):
            assert result[name]["layers"] == tiny_config(**MODELS[name]).num_hidden_layers
            assert_steps_equal(result[name]["steps"], single["steps"], rank)
        # whole on the process that saves
        state = unwrapped(results[0][name]["state"])
        assert state.keys() == single["state"].keys()
        for key, value in single["state"].items():
            torch.testing.assert_close(state[key], value, atol=1e-5, rtol=1e-5, msg=key)


def mixed_precision_work(rank, num_processes, folder, routing):
    """One process trains on the same batches as the others."""
    results = {}
    for name in IN_BF16:
        model = MomaForCausalLM.from_pretrained(folder / name)
        model.config.training_routing = routing
        computed_in = set()
        # of one modality in a model that has them apart
        projection = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
        projection.register_forward_hook(lambda module, args, output, seen=computed_in: seen.add(output.dtype))
        # as the file says
        accelerator = fsdp_accelerator(rank, num_processes, {})
        assert accelerator.mixed_precision == "bf16"
        model, optimizer = accelerator.prepare(model.train(), sgd(model))
        for _ in range(BF16_STEPS):
            accelerator.backward(model(input_ids=MIXED, labels=MIXED, use_cache=False).loss)
            optimizer.step()
            optimizer.zero_grad()
        assert computed_in == {torch.bfloat16}
        results[name] = buffers_of(model)
    if rank == 0:
        torch.save(results, folder / f"of_{num_processes}.pt")


@pytest.mark.parametrize("routing", [pytest.param("expert_choice", marks=slow), "token_choice"])
def test_routers_learn_under_fsdp_in_bf16_as_in_one_process(routing, tmp_path):
    for name, fields in IN_BF16.items():
        tiny_model(**fields, router_bias_update_rate=0.01).save_pretrained(tmp_path / name)
    for num_processes in (1, 2):
        run_group(mixed_precision_work, num_processes, tmp_path, routing, num_processes=num_processes)
    one, two = (torch.load(tmp_path / f"of_{number}.pt") for number in (1, 2))
    for name in IN_BF16:
        assert one[name].keys() == two[name].keys()
        for key, value in one[name].items():
            torch.testing.assert_close(two[name][key], value, atol=1e-6, rtol=0, msg=key)
            assert value.dtype == torch.float32, key
    # every group of this one has tokens in every step
    of_kind = {
        kind: [value for key, value in two["4t4i"].items() if key.endswith(kind)]
        for kind in ("num_updates", "threshold", "balance_bias")
    }
    assert [value.item() for value in of_kind["num_updates"]] == [BF16_STEPS] * 4
    assert all((value != 0.5).all() for value in of_kind["threshold"])
    assert any(value.any() for value in of_kind["balance_bias"]) == (routing == "token_choice")


def run_launched(command, environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as launched:
        try:
            output, _ = launched.communicate(timeout=240)
        except BaseException:
            # the launcher then ends its processes
            launched.terminate()
            raise
    return launched.returncode, output


@pytest.mark.parametrize("kind", ["ddp", "deepspeed_zero3"])
def test_two_launched_processes_pre_train_as_one_that_accumulates(kind, tmp_path):
    if kind == "deepspeed_zero3":
        pytest.importorskip("deepspeed", reason="deepspeed is missing: `pip install modeling-moma[deepspeed]`")

    write_training(tmp_path)

    def arguments(output, *more):
        paths = [text for name in ("processor", "tokens") for text in (f"--{name}", str(tmp_path / name))]
        sizes = trainer_flags(
            max_steps=3, per_device_train_batch_size=2, eval_steps=3, save_steps=3, logging_steps=1, bf16=False
        )
        return [*paths, str(tmp_path / "recipe.json"), "--output", str(tmp_path / output), *sizes, *more]

    def history(output):
        return json.loads((tmp_path / output / "trainer_state.json").read_text())["log_history"]

    path = CONFIG_FOLDER / f"{kind}.yaml"
    launch = f"-m accelerate.commands.launch --config_file {path} --num_processes 2 --mixed_precision no".split()
    launch += f"--num_cpu_threads_per_process 1 --main_process_port {free_port()}".split()
    command = [sys.executable, *launch, "-m", "modeling_moma", "pretrain", *arguments("two")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    for crashes in range(CRASHES + 1):
        code, output = run_launched(command, environment)
        crashed = any(f"exitcode: -{signal.Signals[name].value})" in output for name in CRASH_SIGNALS)
        if not crashed or crashes == CRASHES:
            break
        warnings.warn(f"launched anew: {output[-2000:]}", stacklevel=1)
        shutil.rmtree(tmp_path / "two", ignore_errors=True)
    assert code == 0, output
    pretrain.main(arguments("one", *trainer_flags(gradient_accumulation_steps=2)))
    for two, one in zip(history("two"), history("one"), strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "eval_text_loss", "eval_image_loss"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-4), (key, one["step"])
    two, one = (load_file(tmp_path / output / "model.safetensors") for output in ("two", "one"))
    assert two.keys() == one.keys()
    # an accumulated batch counts as two steps for the cuts, a batch in two parts as one
    for key, value in one.items():
        if not key.endswith(("threshold", "num_updates")):
            torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-4, msg=key)
