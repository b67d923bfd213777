# SPDX-License-Identifier: Apache-2.0
import copy
import math
import os
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import BitsAndBytesConfig, TorchAoConfig

from helpers.captions import caption_model, caption_processor
from helpers.released import RELEASED, skip_without_released_model
from helpers.slow import slow
from helpers.tiny import IMAGE_IDS, noise_images, randomize_auxiliary, tiny_config
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.held_out import CaptionedImages
from modeling_moma.evaluation.measures import draw_images, load_model, write_captions
from modeling_moma.evaluation.retrieval import measure_information
from modeling_moma.export.quantization import quantized_share, torchao_config
from modeling_moma.hub.loading import open_model, refuse_non_finite, require_plain_weights
from modeling_moma.labelling.labeler import ImageLabeler
from modeling_moma.modeling_moma import MomaExperts, MomaForCausalLM
from modeling_moma.quantized_layers_moma import use_quantized_layers
from modeling_moma.upcycling.upcycle import upcycle
from tokenization import MomaProcessor


DATA = Path(__file__).resolve().parents[2] / "data" / "emoji"
CONFIGS = {
    "4t4i": {"num_experts": {"text": 4, "image": 4}, "shared_expert_intermediate_size": {"text": 24, "image": 24}},
    "1t1i": {"num_experts": {"text": 1, "image": 1}, "shared_expert_intermediate_size": 24},
    "untied": {"num_experts": {"text": 4, "image": 1}, "untied_attention": True, "attention_bias": True},
    "depth": {
        "num_experts": {"text": 4, "image": 2},
        "num_hidden_layers": 3,
        "depth_layers": [0, 2],
        "auxiliary_routers": True,
        "qk_norm": "rmsnorm",
        "tie_word_embeddings": True,
    },
}
TEXT_IDS = torch.arange(26, 34)[None]
IMAGE_ROW = torch.tensor([[24, *range(IMAGE_IDS[0], IMAGE_IDS[0] + 4), 25]])
INPUTS = {
    "mixed": torch.cat([TEXT_IDS, IMAGE_ROW], dim=1),
    "text": TEXT_IDS,
    "codes": IMAGE_ROW[:, 1:5],
    "one": TEXT_IDS[:, :1],
}


def int8(kind):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    if kind == "dynamic" and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ("SSE41", "AVX2", "AVX512_CORE"):
        pytest.skip("torch trusts oneDNN with int8 where the CPU has VNNI, and kept from VNNI its sums overflow")
    name = {"weight_only": "Int8WeightOnlyConfig", "dynamic": "Int8DynamicActivationInt8WeightConfig"}[kind]
    # the rest of the session keeps its settings of the compiler
    return getattr(quantization, name)(set_inductor_config=False)


QUANTIZATIONS = {
    "weight_only": lambda: torchao_config(int8("weight_only")),
    "dynamic": lambda: torchao_config(int8("dynamic")),
    "mixed": lambda: torchao_config(int8("dynamic"), int8("weight_only")),
    "weight_only_linear": lambda: TorchAoConfig(int8("weight_only")),
    "dynamic_linear": lambda: TorchAoConfig(int8("dynamic")),
}


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    """Folder of a small model in fp32, and the model."""
    torch.manual_seed(0)
    model = MomaForCausalLM(tiny_config(**CONFIGS[request.param])).eval()
    randomize_auxiliary(model)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model


def is_full_precision(name: str) -> bool:
    """Whether a parameter of this name has to keep its type, whatever is quantised."""
    parts = name.split(".")
    return (
        parts[-1] == "bias"
        or "embed_tokens" in parts
        or "lm_head" in parts
        or any(part.endswith("norm") for part in parts)
        or any(part.endswith("router") for part in parts)
    )


def is_near(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether most logits are: a score next to another may choose another expert for a token."""
    return (logits - expected).abs().median() < 0.1 * expected.std()


def is_quantized(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "qdata") or not parameter.is_floating_point()


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_routers_norms_and_embeddings_keep_their_type_and_all_else_is_quantised(saved, name):
    folder, original = saved
    model = MomaForCausalLM.from_pretrained(folder, quantization_config=QUANTIZATIONS[name]())
    before = dict(original.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        is_left_out = name.endswith("_linear") and "experts" in parameter_name.split(".")
        expected = not is_full_precision(parameter_name) and not is_left_out
        assert is_quantized(parameter) == expected, parameter_name
        if not expected:
            assert torch.equal(parameter, before[parameter_name])
    for buffer_name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32, buffer_name


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_quantised_model_is_near_the_original_whatever_modality_is_missing(saved, name):
    folder, original = saved
    model = MomaForCausalLM.from_pretrained(folder, quantization_config=QUANTIZATIONS[name]())
    with torch.no_grad():
        for input_ids in INPUTS.values():
            logits = model(input_ids, routing="token_choice").logits
            expected = original(input_ids, routing="token_choice").logits
            assert torch.isfinite(logits).all()
            assert is_near(logits, expected)
    ids = model.generate(input_ids=TEXT_IDS, max_new_tokens=8, do_sample=True, generation_mode="interleaved")
    assert ids.shape[1] > TEXT_IDS.shape[1]
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("name", ["weight_only", "dynamic"])
def test_commands_open_a_quantised_model_and_find_what_has_diverged(saved, name, tmp_path):
    model = MomaForCausalLM.from_pretrained(saved[0], quantization_config=QUANTIZATIONS[name]())
    model.save_pretrained(tmp_path)
    opened = open_model(str(tmp_path))
    assert quantized_share(opened) > 0.5
    with pytest.raises(InputError, match="`model` is quantised, and experts are copies of whole weights"):
        upcycle(opened, {"text": 8, "image": 8})
    with pytest.raises(InputError, match="`--model` 'here' is quantised, and such weights are neither trained nor"):
        require_plain_weights("--model", "here", opened.config)
    place, weight = next((place, entry) for place, entry in opened.named_parameters() if hasattr(entry, "qdata"))
    weight.scale.fill_(float("nan"))
    with pytest.raises(InputError, match=f"here: the tensor '{place}' holds NaN or infinite values"):
        refuse_non_finite(opened, "here")


@pytest.mark.parametrize("name", ["weight_only"])
def test_a_quantised_model_labels_searches_and_is_evaluated(name, tmp_path):
    processor = caption_processor()
    caption_model(processor).save_pretrained(tmp_path)
    model = MomaForCausalLM.from_pretrained(tmp_path, quantization_config=QUANTIZATIONS[name]()).eval()
    labeler = ImageLabeler(model, processor)
    codes = labeler.encode(noise_images(2))
    assert [len(labeler.names(codes, 2)), len(labeler.tags(codes, 2))] == [2, 2]
    assert torch.isfinite(labeler.match(codes, ["house"])).all()
    assert len(write_captions(model, processor, codes, batch_size=2, max_new_tokens=2)) == 2
    drawn = draw_images(model, processor, ["house"], batch_size=1, sampling={"do_sample": True}, seed=0)
    assert drawn.shape == codes[:1].shape
    information = measure_information(model, processor, CaptionedImages(codes, ["house", "red apple"]), batch_size=2)
    assert math.isfinite(information["image"]["taken"])


@pytest.mark.parametrize(("saved_in", "opened_in"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_commands_run_what_bitsandbytes_saved_in_another_type(saved, saved_in, opened_in, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = MomaForCausalLM.from_pretrained(saved[0], dtype=saved_in, quantization_config=quantization)
    model.save_pretrained(tmp_path)
    opened = load_model(str(tmp_path), "cpu", opened_in)
    assert opened.dtype == saved_in
    torch.testing.assert_close(opened.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        for input_ids in INPUTS.values():
            # rounding of a product may differ with its place in memory, and then a quantised activation
            assert is_near(opened(input_ids).logits, model.eval()(input_ids).logits)


@pytest.mark.parametrize("name", ["weight_only", "dynamic"])
def test_a_saved_quantised_model_loads_with_equal_logits(saved, name, tmp_path):
    model = MomaForCausalLM.from_pretrained(saved[0], quantization_config=QUANTIZATIONS[name]())
    model.save_pretrained(tmp_path)
    loaded = MomaForCausalLM.from_pretrained(tmp_path)
    assert quantized_share(loaded) == quantized_share(model) > 0.5
    for (_, before), (_, after) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert type(before) is type(after)
        if is_quantized(before):
            assert torch.equal(before.qdata, after.qdata) and torch.equal(before.scale, after.scale)
        else:
            assert torch.equal(before, after)
    with torch.no_grad():
        for input_ids in INPUTS.values():
            logits, expected = loaded(input_ids).logits, model(input_ids).logits
            # rounding of a product may differ with its place in memory, and then an activation's last bit
            assert is_near(logits, expected) if name == "dynamic" else torch.allclose(logits, expected, atol=1e-5)


def test_a_half_precision_model_keeps_fp32_routers_when_quantised(saved):
    model = MomaForCausalLM.from_pretrained(
        saved[0], dtype=torch.bfloat16, quantization_config=QUANTIZATIONS["weight_only"]()
    )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_router = any(part.endswith("router") for part in name.split("."))
        is_fp32 = is_router or "inv_freq" in name
        assert tensor.dtype == (torch.float32 if is_fp32 else torch.bfloat16), name
    assert torch.isfinite(model(INPUTS["mixed"]).logits).all()


@pytest.mark.parametrize("routing", ["expert_choice", "threshold", "token_choice"])
def test_layers_for_quantised_weights_equal_the_others(saved, routing):
    model = copy.deepcopy(saved[1])
    use_quantized_layers(model)
    use_quantized_layers(model)
    has_packed = any(isinstance(module, MomaExperts) for module in model.modules())
    assert model.config._experts_implementation == ("eager" if has_packed else "moma")
    assert saved[1].config._experts_implementation == "moma"
    assert dict(model.named_parameters()).keys() == dict(saved[1].named_parameters()).keys()
    for input_ids in INPUTS.values():
        logits = model(input_ids, routing=routing).logits
        torch.testing.assert_close(logits, saved[1](input_ids, routing=routing).logits, rtol=1e-5, atol=1e-5)


def test_a_loaded_model_that_is_quantised_by_hand_needs_the_layers_only(saved):
    quantize = pytest.importorskip("torchao.quantization", reason="torchao is not installed").quantize_
    model = copy.deepcopy(saved[1])
    quantize(model, QUANTIZATIONS["dynamic"]().quant_type, filter_fn=None)
    use_quantized_layers(model)
    assert quantized_share(model) > 0.5
    with torch.no_grad():
        for input_ids in INPUTS.values():
            assert is_near(
                model(input_ids, routing="token_choice").logits, saved[1](input_ids, routing="token_choice").logits
            )


def test_bitsandbytes_leaves_out_head_and_routers(saved, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder, original = saved
    model = MomaForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            expected = not is_full_precision(name)
            assert isinstance(module, bitsandbytes.nn.Linear8bitLt) == expected, name
    model.save_pretrained(tmp_path)
    loaded = MomaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for input_ids in INPUTS.values():
            logits = model(input_ids, routing="token_choice").logits
            expected = original(input_ids, routing="token_choice").logits
            assert is_near(logits, expected)
            torch.testing.assert_close(loaded(input_ids, routing="token_choice").logits, logits, rtol=1e-3, atol=1e-3)


def test_other_arguments_than_torchao_configurations_are_refused():
    pytest.importorskip("torchao", reason="torchao is not installed")
    with pytest.raises(TypeError, match="`linear_config`.*str"):
        torchao_config("int8")
    with pytest.raises(TypeError, match="`expert_config`"):
        torchao_config(int8("weight_only"), expert_config=8)


@pytest.fixture(scope="module")
def held_out():
    """Released model in fp32, its processor, and a batch of held-out captions with their images."""
    skip_without_released_model()
    processor = MomaProcessor.from_pretrained(RELEASED)
    rows = load_dataset(str(DATA), split="test").shuffle(seed=0).select(range(16))
    captions = [f"{style}: {label}" for style, label in zip(rows["style"], rows["label"])]
    texts = [f"{caption}<image>" if index % 2 else f"<image>{caption}" for index, caption in enumerate(captions)]
    images = [[image] for image in rows["image"]]
    # on the right: padding on the left would have to predict the first token
    inputs = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return processor, {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def released(quantization_config=None):
    return MomaForCausalLM.from_pretrained(RELEASED, dtype=torch.float32, quantization_config=quantization_config)


@pytest.fixture(scope="module")
def full_loss(held_out):
    with torch.no_grad():
        return released()(**held_out[1]).loss.item()


@pytest.mark.parametrize(
    "name", ["weight_only", *(pytest.param(name, marks=slow) for name in ("dynamic", "bitsandbytes"))]
)
def test_the_held_out_loss_of_the_released_model_rises_by_at_most_one_percent(held_out, full_loss, name):
    processor, batch = held_out
    if name == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = QUANTIZATIONS[name]()
    model = released(config)
    with torch.no_grad():
        assert model(**batch).loss.item() <= 1.01 * full_loss
    # packed experts are most of the model
    assert quantized_share(model) == pytest.approx(0.333 if name == "bitsandbytes" else 0.948, abs=0.001)
    ids = model.generate(**processor(text=["noto: red apple"], return_tensors="pt"), generation_mode="image")
    (image,) = processor.decode_images(model.decode_image_tokens(ids))
    # by the processor's VQ model, which is no part of what is quantised
    assert image.size == (64, 64)
