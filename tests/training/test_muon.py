# SPDX-License-Identifier: Apache-2.0
"""Muon on stacks of experts: against torch's own on each matrix, over processes, in a recipe, killed and resumed."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Trainer, TrainingArguments

from helpers.processes import run_group
from helpers.tiny import TRAINED, four_steps, logged_losses, tiny_config, tiny_model, write_training
from modeling_moma import MomaForCausalLM, Muon, freeze_groups, muon_groups
from modeling_moma.cli.pretrain import main, parse_arguments
from modeling_moma.errors_moma import InputError
from modeling_moma.training.muon import MATRICES, newton_schulz
from modeling_moma.training.pretraining import build_trainer


VARIANTS = {
    "4t4i": {},
    "dense": {"num_experts": 1},
    "1t1i": {"num_experts": {"text": 1, "image": 1}},
    "shared": {"shared_expert_intermediate_size": {"text": 8, "image": 16}, "tie_word_embeddings": False},
    "depth": {"depth_layers": [0], "auxiliary_routers": True},
    "untied": {"untied_attention": True},
    "norms by head": {"qk_norm": "layernorm_per_head"},
}


# of a step of each data type: batches of other sizes may be added up in another order
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


class Stack(nn.Module):
    """Two stacks of experts that are made as those of a model, a bias, and a matrix alone in its shape."""

    def __init__(self, num_experts=3, width=6, hidden_size=4):
        super().__init__()
        torch.manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.randn(num_experts, hidden_size, width))
        self.bias = nn.Parameter(torch.randn(hidden_size))
        self.single = nn.Linear(2 * hidden_size, 1, bias=False)

    def parts(self):
        """All matrices, one by one."""
        halves = [half for expert in self.gate_up_proj for half in expert.chunk(2)]
        return [*halves, *self.down_proj, self.single.weight]

    def randomize_gradients(self, generator, idle=()):
        """Gradients at random, of idle experts 0."""
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for expert in idle:
            self.gate_up_proj.grad[expert] = self.down_proj.grad[expert] = 0

    def gradients(self):
        """Those of all matrices, one by one."""
        halves = [half for expert in self.gate_up_proj.grad for half in expert.chunk(2)]
        return [*halves, *self.down_proj.grad, self.single.weight.grad]


@pytest.mark.parametrize("width, hidden_size", [(6, 4), (4, 6), (5, 5), (1, 3)])
def test_each_expert_steps_as_by_the_optimizer_of_torch(width, hidden_size):
    stack, generator = Stack(3, width, hidden_size), torch.Generator().manual_seed(1)
    alone = [nn.Parameter(part.detach().clone()) for part in stack.parts()]
    bias = nn.Parameter(stack.bias.detach().clone())
    muon = Muon(muon_groups(stack, 0.3), lr=0.02, dtype=torch.bfloat16)
    references = [
        torch.optim.Muon(alone, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([bias], lr=0.02, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for step in range(4):
        stack.randomize_gradients(generator)
        for parameter, gradient in zip(alone, stack.gradients(), strict=True):
            parameter.grad = gradient.clone()
        bias.grad = stack.bias.grad.clone()
        for group in [*muon.param_groups, *(group for one in references for group in one.param_groups)]:
            # as a schedule does
            group["lr"] = 0.02 / (1 + step)
        for optimizer in (muon, *references):
            optimizer.step()
    for part, reference in zip(stack.parts(), alone, strict=True):
        # products of a batch of matrices are rounded otherwise than those of one
        torch.testing.assert_close(part, reference.data, atol=2e-3, rtol=0)
    torch.testing.assert_close(stack.bias, bias)


def test_an_expert_without_tokens_has_its_decay_alone_and_hooks_run_once():
    # one that was made before changes what torch calls around a step
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    stack, generator, calls = Stack(), torch.Generator().manual_seed(1), []
    muon = Muon(muon_groups(stack, 0.5), lr=0.02)
    muon.register_step_post_hook(lambda *_: calls.append(1))
    stack.randomize_gradients(generator)
    muon.step()
    stack.randomize_gradients(generator, idle=[1])
    before, gradient = stack.gate_up_proj.detach().clone(), stack.gate_up_proj.grad
    muon.step()
    moved = (stack.gate_up_proj - before * (1 - 0.02 * 0.5)).abs().flatten(1).amax(dim=1) > 1e-6
    assert moved.tolist() == [True, False, True] and len(calls) == 2
    assert stack.gate_up_proj.grad is gradient


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 12), st.integers(0, 12), st.floats(1e-4, 1e4))
@settings(deadline=None, max_examples=40)
def test_singular_values_come_near_1(seed, matrices, rows, more_columns, scale):
    torch.manual_seed(seed)
    # a product of orthogonal matrices with singular values between 0.1 and 1
    left_MRR, _ = torch.linalg.qr(torch.randn(matrices, rows, rows))
    right_MCR, _ = torch.linalg.qr(torch.randn(matrices, rows + more_columns, rows))
    values_MR = 0.1 + 0.9 * torch.rand(matrices, rows)
    x_MRC = left_MRR * values_MR[:, None] @ right_MCR.mT
    orthogonal_MRC = newton_schulz(scale * x_MRC)
    found_MR = torch.linalg.svdvals(orthogonal_MRC)
    assert found_MR.min() > 0.5 and found_MR.max() < 1.3
    # with the singular vectors that it had
    ratio_MRR = left_MRR.mT @ orthogonal_MRC @ right_MCR
    off_diagonal = ratio_MRR - torch.diag_embed(ratio_MRR.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-3
    assert newton_schulz(torch.zeros(1, rows, rows)).eq(0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_projections_and_experts_are_matrices_and_nothing_else(variant):
    model = MomaForCausalLM(tiny_config(**VARIANTS[variant]))
    groups = muon_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)
    matrices = {names[id(parameter)] for group in groups if MATRICES in group for parameter in group["params"]}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stacked = {name for name in names.values() if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))}
    of_adamw = {name for name in linear if "router" in name or name.startswith("lm_head")}
    assert matrices == (linear - of_adamw) | stacked and matrices
    for group in groups:
        for parameter, number in zip(group["params"], group.get(MATRICES, []), strict=False):
            assert number == (2 if names[id(parameter)].endswith("gate_up_proj") else 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_by_default_decay_is_that_of_trainer(variant, tmp_path):
    model = MomaForCausalLM(tiny_config(**VARIANTS[variant]))
    trainer = Trainer(model, TrainingArguments(tmp_path, report_to=[], use_cpu=True))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(entry)] for group in muon_groups(model) if group["weight_decay"] for entry in group["params"]}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert decayed == trained & set(trainer.get_decay_parameter_names(model))


def test_frozen_parameters_stay_and_adapters_are_refused():
    model = tiny_model()
    freeze_groups(model, ["text"])
    grouped = {id(parameter) for group in muon_groups(model) for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with pytest.raises(InputError, match="train adapters by AdamW"):
        muon_groups(get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])))


def test_a_plain_trainer_takes_it_and_goes_on_from_a_checkpoint(tmp_path):
    ids = torch.randint(8, 24, (8, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def train(steps, **more):
        model = tiny_model()
        optimizer = Muon(muon_groups(model), lr=0.01)
        settings = TrainingArguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=4, save_steps=2, report_to=[], use_cpu=True,
            lr_scheduler_type="constant", logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train(**more)
        return trainer

    whole, resumed = train(4), train(4, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = [log["loss"] for log in whole.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    for name, parameter in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], parameter, msg=name)


def three_steps(dtype, **settings):
    """A stack after three steps whose iterations are of `dtype`."""
    stack, generator = Stack(5), torch.Generator().manual_seed(1)
    muon = Muon(muon_groups(stack), lr=0.02, dtype=dtype, **settings)
    for _ in range(3):
        stack.randomize_gradients(generator)
        muon.step()
    return stack


def steps_in_a_group(rank, folder):
    for dtype in TOLERANCES:
        stack = three_steps(dtype, divides_work=True)
        torch.save(stack.state_dict(), folder / f"{rank}-{dtype}.pt")
    mesh = init_device_mesh("cpu", (2,))
    stack.down_proj = nn.Parameter(distribute_tensor(stack.down_proj.detach()[:4], mesh, [Shard(0)]))
    with pytest.raises(InputError, match="'down_proj' is sharded"):
        muon_groups(stack)


def test_processes_that_divide_the_work_step_as_one(tmp_path):
    run_group(steps_in_a_group, tmp_path)
    for dtype, tolerance in TOLERANCES.items():
        states = [torch.load(tmp_path / f"{rank}-{dtype}.pt") for rank in range(2)]
        for name, parameter in three_steps(dtype).state_dict().items():
            assert torch.equal(states[0][name], states[1][name])
            torch.testing.assert_close(states[0][name], parameter, atol=tolerance, rtol=0)


def test_memory_is_bounded_by_steps_in_parts(monkeypatch):
    whole, parts = Stack(), Stack()
    for stack, most in ((whole, 2**26), (parts, 1)):
        monkeypatch.setattr("modeling_moma.training.muon._NUMBERS_AT_ONCE", most)
        generator = torch.Generator().manual_seed(1)
        muon = Muon(muon_groups(stack), lr=0.02)
        for _ in range(2):
            stack.randomize_gradients(generator)
            muon.step()
    for name, parameter in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], parameter, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("muon")
    write_training(folder, codings=3)
    for optim in ("muon", "adamw_torch"):
        recipe = {"model": TRAINED, "trainer": {"optim": optim, "warmup_steps": 2}}
        (folder / f"{optim}.json").write_text(json.dumps(recipe))
    return folder


def test_a_recipe_trains_by_it_and_goes_on_where_it_stopped(inputs, tmp_path):
    main(four_steps(inputs, tmp_path / "whole", "muon"))
    main(four_steps(inputs, tmp_path / "stopped", "muon", "--stop-at", "2"))
    with pytest.raises(InputError, match="optim = 'muon' there and 'adamw_torch' now"):
        main(four_steps(inputs, tmp_path / "stopped", "adamw_torch", "--resume"))
    main(four_steps(inputs, tmp_path / "stopped", "muon", "--resume"))
    assert logged_losses(tmp_path / "stopped") == pytest.approx(logged_losses(tmp_path / "whole"), abs=1e-5)
    assert len(logged_losses(tmp_path / "whole")) == 4
    main(four_steps(inputs, tmp_path / "adamw", "adamw_torch"))
    # the first step has a learning rate of 0
    assert logged_losses(tmp_path / "adamw")[:2] == pytest.approx(logged_losses(tmp_path / "whole")[:2], abs=1e-5)
    assert logged_losses(tmp_path / "adamw")[3] != pytest.approx(logged_losses(tmp_path / "whole")[3], abs=1e-5)


def test_parameters_named_by_the_arguments_have_no_decay(inputs, tmp_path):
    trainer = build_trainer(parse_arguments(four_steps(inputs, tmp_path, "muon", "--train-groups", "image")))
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, Muon)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decays = {names[id(entry)]: group["weight_decay"] for group in optimizer.param_groups for entry in group["params"]}
    assert decays["model.embed_tokens.weight"] == 0.0
    assert decays["model.layers.0.mlp.groups.image.experts.down_proj"] == 0.1
    assert not any(".text." in name or "self_attn" in name for name in decays)


@pytest.mark.parametrize("name, value", [("optim_args", "momentum=0.9"), ("optim_target_modules", "all-linear")])
def test_arguments_that_it_does_not_take_are_refused(inputs, tmp_path, name, value):
    recipe = {"model": TRAINED, "trainer": {"optim": "muon", name: value}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    given = four_steps(inputs, tmp_path / "out", "muon")
    given[given.index(str(inputs / "muon.json"))] = str(tmp_path / "recipe.json")
    with pytest.raises(InputError, match=f"{name} = {value!r}.*optim = 'muon'"):
        main(given)
