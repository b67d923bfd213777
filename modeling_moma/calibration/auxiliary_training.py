# SPDX-License-Identifier: Apache-2.0
"""Training of auxiliary routers, and the saving of a model of which routers alone have changed.

All else is frozen; a small network for each router learns to predict which tokens the top K will hold.

Shape suffixes:
    N tokens that compete for a router, S scores of a token.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import ModelOutput

from tokenization import MomaProcessor

from ..errors_moma import InputError
from ..modeling_moma import MomaForCausalLM
from ..routing_moma import MomaAuxiliaryRouter
from ..utils.atomic_files import write_folder_aside
from ..utils.hardware import refuse_data_parallel
from ..utils.records import finite_json
from .observation import RouterRecord, auxiliary_rule, named_routers, observed_routers, run_observed, threshold_rule
from .selection_counts import SelectionCounts
from .thresholds import require_auxiliary_routers


# the least probability that takes a token in the paper
PAPER_THRESHOLD = 0.5
AUXILIARY_RULES = {
    "auxiliary_0.5": lambda record: record.predicted_NS >= PAPER_THRESHOLD,
    "auxiliary": auxiliary_rule,
    "threshold": threshold_rule,
}


def add_auxiliary_routers(model: MomaForCausalLM) -> MomaForCausalLM:
    """Give every router of a model, of experts and of depth layers, a fresh auxiliary one (MoMa section 2.4).

    All other weights and buffers stay the very same tensors, so a large model needs no second copy. What `routing`
    does by default stays, too.

    Args:
        model (`MomaForCausalLM`):
            changed in place, its config's `auxiliary_routers` included.

    Returns:
        `MomaForCausalLM`: the same model.

    Raises:
        ValueError: the model has auxiliary routers already, or no routers at all.
    """
    if model.config.auxiliary_routers:
        raise InputError("`model` has config.auxiliary_routers=True: fresh auxiliary routers would replace its own.")
    routers = named_routers(model)
    model.config.auxiliary_routers = True
    for router in routers.values():
        num_scores, num_thresholds = router.weight.shape[0], router.threshold.shape[0]
        auxiliary = MomaAuxiliaryRouter(model.config, num_scores, num_thresholds)
        auxiliary.apply(model._init_weights)
        router.auxiliary = auxiliary.to(router.weight.device).train(router.training)
    return model


def membership_loss(record: RouterRecord) -> torch.Tensor:
    """Return binary cross-entropy of membership in the top K."""
    logits_NS = record.router.auxiliary(record.hidden_ND.detach())
    target_NS = record.is_member_NS.to(logits_NS.dtype)
    total = nn.functional.binary_cross_entropy_with_logits(logits_NS, target_NS, reduction="sum")
    return total / max(logits_NS.numel(), 1)


@contextmanager
def only_auxiliary_trainable(model: nn.Module):
    """Let the auxiliary routers alone require gradients within this context; then every parameter is as it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for router in named_routers(model).values():
        router.auxiliary.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


class AuxiliaryRouterTrainer(Trainer):
    """A `Trainer` of the auxiliary routers alone: all other weights and buffers stay bit for bit as they are.

    The model runs in eval mode under `expert_choice`. The targets are the true top K of each batch, so the batch size
    should be that of the main training. The loss is the mean over the routers of [`membership_loss`]; `labels` are
    not used. It becomes part of the model's output inside the forward, where processes can find its parameters.

    `evaluate` reports `eval_loss`, and over all routers together `eval_accuracy`, `eval_precision`, `eval_recall`, the
    share of (token, expert) pairs that the auxiliary routers take at their thresholds (`eval_load`), and the share
    that the top K holds (`eval_true_load`).

    It takes the arguments of `Trainer` but `model_init`. The routers are observed by forward hooks, so it runs neither
    with `torch_compile`, nor with several devices in one process, nor under FSDP and DeepSpeed.

    Args:
        args (`Any`):
            those of `Trainer`.
        kwargs (`Any`):
            those of `Trainer`, without `model_init`.

    Raises:
        ValueError: the model has no auxiliary routers, see [`add_auxiliary_routers`]; or an argument cannot be served.
    """

    model: PreTrainedModel

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        require_auxiliary_routers(self.model)
        if self.model_init is not None:
            raise InputError(
                "`model_init` is given, and train() would put a new model in the place of this one: give `model`."
            )
        if self.args.torch_compile:
            raise InputError(
                "`args` has torch_compile=True, but compiled models skip the hooks that observe routers: leave it out."
            )
        refuse_data_parallel(self.args)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "`args` trains under FSDP or DeepSpeed, where weights are there only while their own layer runs: "
                "auxiliary routers are trained under DDP."
            )
        # the loss is a mean already: accumulated steps are to be averaged
        self.model_accepts_loss_kwargs = False
        self._counts = None

    def train(self, *args, **kwargs):
        """See `Trainer.train`; afterwards the same parameters require gradients as before."""
        with only_auxiliary_trainable(self.model):
            return super().train(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the mean of the losses of one batch's routers that had tokens; see `Trainer.compute_loss`."""
        model.eval()
        losses, num_with_tokens = [], 0

        def observe(record: RouterRecord):
            nonlocal num_with_tokens
            losses.append(membership_loss(record))
            num_with_tokens += len(record.hidden_ND) > 0
            if self._counts is not None:
                self._counts.add(record)

        def put_loss(module: nn.Module, args: tuple, output: ModelOutput) -> ModelOutput:
            if not losses:
                raise InputError(
                    f"`model` is a {type(module).__name__} whose forward ran none of its routers, so there is nothing "
                    "to learn from: was it compiled, or does it call copies of its layers?"
                )
            # those without tokens have a loss of 0, and zeros as gradients
            output.loss = torch.stack([loss.to(losses[0].device) for loss in losses]).sum() / max(num_with_tokens, 1)
            return output

        inner = self.accelerator.unwrap_model(model)
        with observed_routers(inner, observe):
            handle = inner.register_forward_hook(put_loss)
            try:
                inputs = {name: values for name, values in inputs.items() if name != "labels"}
                outputs = model(**inputs, routing="expert_choice", use_cache=False, logits_to_keep=1, return_dict=True)
            finally:
                handle.remove()
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss alone; `evaluation_loop` counts what the auxiliary routers take."""
        with self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """See `Trainer.evaluation_loop`; adds how well the auxiliary routers predict."""
        self._counts = SelectionCounts({"auxiliary": auxiliary_rule})
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            self._counts.reduce(self.args.device)
            totals = self._counts.totals("auxiliary")
        finally:
            self._counts = None
        output.metrics.update(  # pyright: ignore[reportOptionalMemberAccess]
            {f"{metric_key_prefix}_{name}": value for name, value in totals.items() if value is not None}
        )
        return output


def auxiliary_report(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> list[dict]:
    """Compare what causal rules take with the true top K, router by router.

    All rules are functions of a router's input alone, so one forward under `expert_choice` serves them all: under
    each of them, earlier layers are taken to have chosen well.

    Args:
        model (`PreTrainedModel`):
            with `config.auxiliary_routers`; not changed.
        batches (`Iterable[dict[str, torch.Tensor]]`):
            held-out inputs of the model; `labels` are left out.

    Returns:
        `list[dict]`: one row for each router, in the order of the forward, fit for JSON:

        - `router`, its module's name, `layer`, and `group`, `"depth"` for the router of a depth layer;
        - `tokens` and `true_loads`, lists with an entry for each expert, or each pool of a depth layer. With several
          processes `tokens` are the sum over all: a batch that each of them brings counts once for each;
        - `true_load`, the share of (token, expert) pairs in the top K;
        - `rules`, with an entry for each rule: `"auxiliary_0.5"` compares predicted probabilities with one half as the
          paper does, `"auxiliary"` at the model's auxiliary thresholds, `"threshold"` is the routing of this name. An
          entry has `accuracy`, `precision`, `recall`, `load`, and `loads` as `true_loads`.

        All are ratios of counts that are summed up first, `None` where there is nothing to divide by.

    Raises:
        ValueError: there is no batch, or the model has no auxiliary routers.
    """
    require_auxiliary_routers(model)
    counts = SelectionCounts(AUXILIARY_RULES)
    run_observed(model, batches, counts.add)
    counts.reduce(model.device)
    return counts.rows()


def save_with_processor(
    model: MomaForCausalLM, source: str, processor: MomaProcessor, output: str, report_file: str, report: dict
):
    """Save a model that differs from its source in routers only: the weights in the dtype that they came in."""
    stored = MomaForCausalLM.from_pretrained(source, dtype="auto")
    if model.config.auxiliary_routers and not stored.config.auxiliary_routers:
        add_auxiliary_routers(stored)
    # routers are fp32 in every model; the other weights may have been loaded in another type
    for name, router in named_routers(model).items():
        stored.get_submodule(name).load_state_dict(router.state_dict())
    for name in ("inference_routing", "depth_inference_routing"):
        setattr(stored.config, name, getattr(model.config, name))

    def write(folder: Path):
        stored.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / report_file).write_text(finite_json(report))

    write_folder_aside(output, write)
