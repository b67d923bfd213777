# SPDX-License-Identifier: Apache-2.0
"""Muon for a model whose experts lie in stacks: the step of each matrix is orthogonal, each expert's for itself."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from ..cpu_moma import multiplies_with
from ..errors_moma import InputError


# value of `optim` in a recipe
MUON = "muon"
# Newton and Schulz's iteration by a quintic whose slope at 0 is largest: x <- a x + (b x x^T + c (x x^T)^2) x
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SMALLEST_NORM = 1e-7
# root mean square of a step of AdamW by a learning rate of 1
_ADAMW_RMS = 0.2
# numbers that are made orthogonal at once, which bounds the memory beside the states
_NUMBERS_AT_ONCE = 2**26
# field of a group of matrices: how many lie one above the other in the rows of each parameter
MATRICES = "num_stacked"


@dataclass(frozen=True)
class _Matrices:
    """A parameter of matrices.

    Attributes:
        parameter (`torch.Tensor`):
            `[..., rows, columns]`.
        gradient (`torch.Tensor`):
            of it.
        group (`dict[str, Any]`):
            of the optimizer.
        num_stacked (`int`):
            matrices that lie one above the other in the rows.
    """

    parameter: torch.Tensor
    gradient: torch.Tensor
    group: dict[str, Any]
    num_stacked: int

    @property
    def wide_shape(self) -> tuple[int, int]:
        """Rows and columns of each matrix, of which the rows are made the fewer ones."""
        rows, columns = self.parameter.shape[-2] // self.num_stacked, self.parameter.shape[-1]
        return min(rows, columns), max(rows, columns)

    def split(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values`, shaped as the parameter, as matrices `[M, R, C]` with at most as many rows as columns."""
        rows, columns = values.shape[-2] // self.num_stacked, values.shape[-1]
        values_MRC = values.reshape(-1, rows, columns)
        return values_MRC if rows <= columns else values_MRC.mT

    def join(self, values_MRC: torch.Tensor) -> torch.Tensor:
        """Return what `split` has split in the parameter's shape."""
        rows, columns = self.parameter.shape[-2] // self.num_stacked, self.parameter.shape[-1]
        values_MRC = values_MRC if rows <= columns else values_MRC.mT
        return values_MRC.reshape(self.parameter.shape)


class Muon(torch.optim.Optimizer):
    """Muon for matrices and stacks of matrices, AdamW for everything else.

    The step of a matrix is its momentum with all singular values near 1 (Jordan 2024), as large as AdamW's steps are,
    so that learning rates and weight decay of AdamW fit (Moonlight, arXiv 2502.16982, section 2.2). Each expert of a
    stack is a matrix of its own, and so are both halves of `gate_up_proj`. An expert whose gradient is zero, since no
    token of the batch chose it, has its weight decay alone: an orthogonal step would be as long as all others, however
    old its momentum. In bfloat16 and without stacks it is `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` beside
    `torch.optim.AdamW`.

    Args:
        params (`Iterable[dict]`):
            groups of parameters, as [`muon_groups`] makes them: those of matrices have a list `num_stacked` that says
            how many matrices lie one above the other in the rows of each parameter `[..., rows, columns]`.
        lr (`float`, *optional*, defaults to `0.001`):
            learning rate of both.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`):
            of AdamW.
        eps (`float`, *optional*, defaults to `1e-8`):
            of AdamW.
        weight_decay (`float`, *optional*, defaults to `0.1`):
            of both, decoupled.
        momentum (`float`, *optional*, defaults to `0.95`):
            of the matrices, Nesterov's.
        iterations (`int`, *optional*, defaults to `5`):
            of Newton and Schulz.
        dtype (`torch.dtype`, *optional*):
            of the iterations; by default bfloat16 where matrix units multiply it, else float32, which is the faster
            one on other CPUs.
        divides_work (`bool`, *optional*, defaults to `False`):
            whether all processes of the default group hold the same parameters and gradients, as under DDP: each then
            orthogonalizes its part and sends it to the others.
    """

    def __init__(
        self,
        params: Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        iterations: int = 5,
        dtype: torch.dtype | None = None,
        divides_work: bool = False,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "momentum": momentum, "iterations": iterations})
        self.dtype, self.divides_work = dtype, divides_work

    @torch.no_grad()
    def step(self, closure=None):
        """Take a step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike: dict[tuple, list[_Matrices]] = defaultdict(list)
        for group in self.param_groups:
            if MATRICES not in group:
                self._adamw_step(group)
                continue
            for parameter, num_stacked in zip(group["params"], group[MATRICES], strict=True):
                if parameter.grad is not None:
                    matrices = _Matrices(parameter, parameter.grad, group, num_stacked)
                    key = (matrices.wide_shape, parameter.device, parameter.dtype, group["iterations"])
                    alike[key].append(matrices)
        for entries in alike.values():
            for batch in _batches(entries):
                self._step_alike(batch)
        return loss

    def _adamw_step(self, group: dict[str, Any]):
        """Take a step of parameters that are no matrices."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update(step=torch.tensor(0.0), **zeros)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # pyright: ignore[reportArgumentType]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_alike(self, batch: list[_Matrices]):
        """Take the step of parameters whose matrices are alike in shape."""
        updates = [self._update(entry) for entry in batch]
        orthogonal_MRC = self._orthogonal(torch.cat(updates), batch[0].group["iterations"])
        for entry, part_MRC in zip(batch, orthogonal_MRC.split([len(update) for update in updates]), strict=True):
            parameter, group = entry.parameter, entry.group
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            scale = _ADAMW_RMS * math.sqrt(max(entry.wide_shape))
            parameter.add_(entry.join(part_MRC).to(parameter.dtype), alpha=-group["lr"] * scale)

    def _update(self, entry: _Matrices) -> torch.Tensor:
        """Return the momentum of a parameter, Nesterov's, as matrices `[M, R, C]`, zero where the gradient is."""
        gradient, state = entry.gradient, self.state[entry.parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(entry.parameter)
        momentum = entry.group["momentum"]
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update_MRC = entry.split(gradient.lerp(buffer, momentum))
        learns_M = entry.split(gradient).flatten(1).ne(0).any(dim=1)
        return update_MRC * learns_M[:, None, None]

    def _orthogonal(self, x_MRC: torch.Tensor, iterations: int) -> torch.Tensor:
        """Return matrices with the singular vectors of `x_MRC`, and singular values near 1."""
        dtype = self.dtype
        if dtype is None:
            has_matrix_units = x_MRC.is_cuda or multiplies_with("amx_bf16")
            dtype = torch.bfloat16 if has_matrix_units else torch.float32
        if not self.divides_work:
            return newton_schulz(x_MRC.to(dtype), iterations)
        # all parts are alike in size, the last one filled up with zeros
        part = -(-len(x_MRC) // dist.get_world_size())
        own_MRC = x_MRC[dist.get_rank() * part :][:part].to(dtype)
        own_MRC = newton_schulz(own_MRC, iterations)
        filled_MRC = own_MRC.new_zeros(part, *own_MRC.shape[1:])
        filled_MRC[: len(own_MRC)] = own_MRC
        all_MRC = filled_MRC.new_empty(part * dist.get_world_size(), *own_MRC.shape[1:])
        dist.all_gather_into_tensor(all_MRC, filled_MRC)
        return all_MRC[: len(x_MRC)]


def newton_schulz(x_MRC: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Return matrices with the singular vectors of given ones, and singular values between about 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    norm_M = x_MRC.flatten(1).norm(dim=1)
    x_MRC = x_MRC / norm_M.clamp(min=_SMALLEST_NORM)[:, None, None]
    for _ in range(iterations):
        gram_MRR = x_MRC @ x_MRC.mT
        polynomial_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c)
        x_MRC = torch.baddbmm(x_MRC, polynomial_MRR, x_MRC, beta=a)
    return x_MRC


def muon_groups(
    model: nn.Module, weight_decay: float = 0.1, decayed: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Return a model's trainable parameters as groups for [`Muon`].

    Matrices are the weights of linear layers and the stacks of experts. Embeddings, the head, routers, norms and
    biases are AdamW's.

    Args:
        model (`nn.Module`):
            a MoMa.
        weight_decay (`float`, *optional*, defaults to `0.1`):
            of the parameters that have one.
        decayed (`Collection[str]`, *optional*):
            their names, as `Trainer.get_decay_parameter_names` gives them; by default matrices, embeddings, the head
            and routers.

    Raises:
        ValueError: parameters are sharded, so that no process has whole matrices, or belong to PEFT's adapters, of
            which some are as many matrices as there are experts.
    """
    if hasattr(model, "peft_config"):
        raise InputError(f"optim = {MUON!r} is for whole weights: train adapters by AdamW.")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    vocabulary = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding) or module is head
    }
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor):
            raise InputError(
                f"optim = {MUON!r}: {name!r} is sharded, and Muon needs whole matrices on each process: train under "
                "DDP, or by AdamW."
            )
        is_router = "router" in name
        is_stack = parameter.ndim == 3
        is_matrix = is_stack or (id(parameter) in linear and not is_router)
        if decayed is None:
            is_decayed = is_matrix or is_router and parameter.ndim == 2 or id(parameter) in vocabulary
        else:
            is_decayed = name in decayed
        key = (is_matrix, is_decayed)
        group = groups.setdefault(key, {"params": [], "weight_decay": weight_decay if is_decayed else 0.0})
        group["params"].append(parameter)
        if is_matrix:
            # gate and up lie one above the other
            group.setdefault(MATRICES, []).append(2 if is_stack and name.endswith("gate_up_proj") else 1)
    return list(groups.values())


def _batches(entries: list[_Matrices]) -> Iterable[list[_Matrices]]:
    """Yield entries in their order, as many at once as the memory for them allows, at least one."""
    batch: list[_Matrices] = []
    size = 0
    for entry in entries:
        if batch and size + entry.parameter.numel() > _NUMBERS_AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += entry.parameter.numel()
    if batch:
        yield batch
