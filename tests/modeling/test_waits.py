# SPDX-License-Identifier: Apache-2.0
"""How often a forward makes the host wait for a device: counted on a CPU that is taken for one."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from helpers.reference import GROUPS, fields_of
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma import devices_moma, experts_implementations_moma, modeling_moma
from modeling_moma.token_groups_moma import DispatchLayout


# what reads numbers of a tensor, or makes a tensor whose size only its numbers tell
METHODS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")
# what copies numbers of a list to a device
UPLOADS = ("tensor", "as_tensor", "new_tensor")
OPERATIONS = ("nonzero", "masked_select", "_local_scalar_dense", "unique", "equal", "bincount")
# kernels of groups, where there is none for a type or a size
FALLBACKS = ("grouped_mm_fallback", "grouped_mm_fallback_backward")


class Waits(TorchFunctionMode):
    """Names of the calls that wait."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in METHODS or (name in UPLOADS and any(isinstance(arg, list) and arg for arg in args)):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class WaitingOperations(TorchDispatchMode):
    """The same below Python, where operations call one another."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in OPERATIONS or name in FALLBACKS:
            self.names.append(name)
        if name == "_grouped_mm" and args[0].dtype != torch.bfloat16:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(devices_moma, "_CPU", ())


def waits_of(forward):
    waits = Waits()
    with WaitingOperations(waits.names), waits:
        forward()
    return waits.names


@torch.no_grad()
@pytest.mark.parametrize(
    "groups, routing", [("dense", "threshold"), ("1t1i", "threshold"), ("8x", "token_choice"), ("4t4i", "auxiliary")]
)
def test_inference_waits_once_a_forward_for_the_sizes_of_its_groups(device, groups, routing):
    model = tiny_model(**GROUPS[groups], **fields_of(routing), inference_routing=routing).eval()
    ids = mixed_ids()
    cache = DynamicCache(config=model.config)
    assert waits_of(lambda: model(ids[:, :8], cache=cache)) == ["tolist"]
    assert waits_of(lambda: model(ids[:, 8:9], cache=cache)) == ["tolist"]


@pytest.fixture
def kernel(monkeypatch):
    """A kernel as on a GPU: what it leaves behind the last end, in outputs and in gradients, is no number."""
    grouped = torch.nn.functional.grouped_mm

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x_PD, weight_EDF, ends_E):
            ctx.save_for_backward(x_PD, weight_EDF, ends_E)
            return unwritten(grouped(x_PD, weight_EDF, offs=ends_E), ends_E)

        @staticmethod
        def backward(ctx, grad_PF):
            x_PD, weight_EDF, ends_E = ctx.saved_tensors
            begins = [0, *ends_E.view(torch.int32).numpy().tolist()]
            x_grad_PD, weight_grad_EDF = torch.full_like(x_PD, torch.nan), torch.zeros_like(weight_EDF)
            for expert, (begin, end) in enumerate(zip(begins, begins[1:])):
                x_grad_PD[begin:end] = grad_PF[begin:end] @ weight_EDF[expert].t()
                weight_grad_EDF[expert] = x_PD[begin:end].t() @ grad_PF[begin:end]
            return x_grad_PD, weight_grad_EDF, None

    def unwritten(y_PF, ends_E):
        return torch.where(torch.arange(len(y_PF)).unsqueeze(-1) < ends_E[-1], y_PF, torch.nan)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda x, weight, offs: Kernel.apply(x, weight, offs))
    # the project's own kernel takes any type here, so that gradients can be compared closely
    monkeypatch.setattr(experts_implementations_moma, "_has_kernel", lambda dtype, sizes: True)


PRECISIONS = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.float32, True)}


@pytest.mark.parametrize(
    ("routing", "groups", "precision", "skip_logits"),
    [
        ("expert_choice", "8x", "bf16", True),
        ("threshold", "8x", "autocast", True),
        ("token_choice", "4t4i", "fp32", False),
    ],
)
def test_a_training_step_waits_once(device, routing, groups, precision, skip_logits):
    dtype, is_autocast = PRECISIONS[precision]
    fields = {"modality_loss_weights": {"text": 3.0}, "z_loss_coef": 0.01, "routing_warmup_steps": 2}
    model = tiny_model(**GROUPS[groups], **fields, training_routing=routing).to(dtype).train()
    ids = mixed_ids()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            loss = model(ids, labels=ids, use_cache=False, skip_logits=skip_logits).loss
        loss.backward()

    waits = waits_of(step)
    # torch's kernel of groups for CPUs looks at the ends
    assert [name for name in waits if name != "_local_scalar_dense"] == ["tolist"]


@pytest.mark.parametrize(
    ("routing", "form", "checkpointing"),
    [
        ("expert_choice", "sorted", False),
        ("threshold", "sorted", True),
        ("token_choice", "fixed", True),
        ("threshold", "counted", False),
    ],
)
def test_training_without_waiting_is_the_same(monkeypatch, request, routing, form, checkpointing):
    fields = {**GROUPS["4t4i"], **fields_of(routing), "training_routing": routing, "gate_after_norm": True}
    found = []
    for is_device in (False, True):
        if is_device:
            if form == "sorted":
                request.getfixturevalue("kernel")
            elif form == "counted":
                monkeypatch.setattr(experts_implementations_moma, "_AFFORDABLE_BYTES", 0)
            monkeypatch.setattr(devices_moma, "_CPU", ())
        model = tiny_model(**fields, normalize_gates=True).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        for seed in range(2):
            ids, mask = mixed_ids(seed=seed), torch.ones_like(mixed_ids())
            mask[0, :3] = 0
            model.zero_grad()
            output = model(ids, labels=ids, attention_mask=mask, use_cache=False)
            output.loss.backward()
        found.append(
            {
                "logits": output.logits[mask == 1],
                **{name: weight.grad for name, weight in model.named_parameters()},
                **dict(model.named_buffers()),
            }
        )
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("depth_routing", "capacity"),
    [("expert_choice", 0.5), ("threshold", {"text": 0.5, "image": 0.7}), ("token_choice", 0.5)],
)
def test_a_depth_layer_waits_once_more(device, capacity, depth_routing):
    fields = {**GROUPS["4t4i"], "training_routing": "expert_choice"}
    plain = tiny_model(**fields)
    model = tiny_model(**fields, depth_layers=[0, 1], depth_capacity=capacity)
    ids, mask = mixed_ids(3), torch.ones_like(mixed_ids(3))
    mask[0, :3] = 0
    given = {"input_ids": ids, "labels": ids, "depth_routing": depth_routing, "use_cache": False}
    # the library looks at a mask of padding
    inputs = {**given, "attention_mask": mask}
    waits = [waits_of(lambda each=each: each(**inputs).loss.backward()) for each in (plain, model)]
    assert sorted(waits[1]) == sorted(waits[0] + ["tolist"] * 2)
    model.eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        assert waits_of(lambda: model(ids[:, :8], cache=cache)) == ["tolist"] * 3
        for place in range(8, 12):
            assert waits_of(lambda place=place: model(ids[:, place : place + 1], cache=cache)) == ["tolist"] * 3


@torch.no_grad()
@pytest.mark.parametrize(
    ("routing", "normalize_gates"), [("threshold", True), ("token_choice", False), ("auxiliary", True)]
)
def test_without_waiting_the_outputs_are_the_same(monkeypatch, routing, normalize_gates):
    model = tiny_model(**GROUPS["4t4i"], **fields_of(routing), normalize_gates=normalize_gates).eval()
    ids, mask = mixed_ids(), torch.ones_like(mixed_ids())
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask, routing=routing).logits
    monkeypatch.setattr(devices_moma, "_CPU", ())
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, :7], attention_mask=mask[:, :7], cache=cache, routing=routing).logits]
    for place in range(7, ids.shape[1]):
        step = ids[:, place : place + 1]
        parts.append(model(step, attention_mask=mask[:, : place + 1], cache=cache, routing=routing).logits)
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("routing", "is_training"), [("threshold", True), ("token_choice", False)])
def test_experts_that_a_device_map_leaves_on_the_cpu_take_their_own_pairs(monkeypatch, routing, is_training):
    fields = {**GROUPS["4t4i"], **fields_of(routing), "training_routing": routing}
    ids, found = mixed_ids(), []
    for form in (DispatchLayout.RAGGED, DispatchLayout.SORTED):
        monkeypatch.setattr(modeling_moma, "choose_dispatch_layout", lambda *given, form=form: form)
        model = tiny_model(**fields).train(is_training)
        with torch.set_grad_enabled(is_training):
            output = model(ids, labels=ids, use_cache=False)
        if is_training:
            output.loss.backward()
        found.append([output.logits, *(weight.grad for weight in model.parameters() if is_training)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
