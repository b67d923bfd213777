# SPDX-License-Identifier: Apache-2.0
"""The real vLLM, in the tests' own process: tokens equal those of `generate`."""

import gc
import shutil
from contextlib import contextmanager
from importlib.metadata import entry_points

import pytest
import torch
from safetensors.torch import load_file

from helpers.served import CONFIGURATIONS, greedy, prompts, save, served_model
from helpers.tiny import noise_images


vllm = pytest.importorskip("vllm", reason="vLLM has an environment of its own: `make test-vllm`")

from vllm.exceptions import VLLMValidationError  # noqa: E402

from modeling_moma.hub.upload import installed_code  # noqa: E402
from modeling_moma.serving.vllm import engine_logprobs, guided_frame  # noqa: E402


@contextmanager
def engine(folder, **kwargs):
    """vLLM with a model from a folder, without `trust_remote_code`."""
    llm = vllm.LLM(str(folder), **{"dtype": "float32", "max_num_seqs": 16, **kwargs})
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        vllm.distributed.cleanup_dist_env_and_memory()


def ask(llm, answers, new_tokens=None):
    """Greedy tokens for all prompts at once."""
    params = [
        vllm.SamplingParams(
            temperature=0.0, max_tokens=new_tokens or len(answer.ids), extra_args={"generation_mode": answer.mode}
        )
        for answer in answers
    ]
    outputs = llm.generate([{"prompt_token_ids": answer.prompt} for answer in answers], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    """Folders and what `generate` answers, made before vLLM puts its own class under the model's."""
    made, folder = {}, tmp_path_factory.mktemp("models")
    for name, fields in CONFIGURATIONS.items():
        model = served_model(processor, **fields)
        answers = [greedy(model, prompt) for prompt in prompts(processor)]
        for prompt in prompts(processor)[:2]:
            answers.append(greedy(model, prompt, "image", None))
            answers.append(greedy(model, prompt, "interleaved", 40))
        # a model without its processor is served, too
        made[name] = save(model, processor, folder, name, with_processor=name != "dense"), answers
    model = served_model(processor, **CONFIGURATIONS["4t4i, threshold"])
    words = prompts(processor)[0]
    guided = greedy(model, words, "image", None, guidance_scale=3.0)
    model = served_model(processor, depth_layers=[0])
    return made, guided, save(model, processor, folder, "depth")


def test_the_plugin_is_found():
    found = {entry.name: entry.value for entry in entry_points(group="vllm.general_plugins")}
    assert found["moma"] == "modeling_moma.serving.vllm.plugin:register"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_greedy_tokens_equal_generate(saved, processor, name):
    folder, answers = saved[0][name]
    begin, end = processor.begin_image_token_id, processor.end_image_token_id
    with engine(folder) as llm:
        got = ask(llm, answers)
    assert got == [answer.ids for answer in answers]
    # the prompts tell the models apart, and images are whole
    assert len({tuple(answer.ids) for answer in answers}) > 6
    for answer in answers:
        if answer.mode == "image":
            assert answer.ids[0] == begin and answer.ids[-1] == end and len(answer.ids) == 18


def test_routers_compute_in_fp32_in_a_half_precision_model(saved):
    folder, _ = saved[0]["auxiliary"]
    router = "layers.0.mlp.groups.text.router"
    hidden = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def ask_router(model):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        types = {tensor.dtype for name, tensor in tensors if "router" in name.split(".")}
        return types, model.model.get_submodule(router).predicted_scores(hidden)

    with engine(folder, dtype="bfloat16") as llm:
        ((types, scores),) = llm.apply_model(ask_router)
    assert types == {torch.float32}
    weights = load_file(folder / "model.safetensors")
    up, down = (weights[f"model.{router}.auxiliary.{name}_proj.weight"].float() for name in ("up", "down"))
    expected = torch.sigmoid(torch.nn.functional.silu(hidden.float() @ up.t()) @ down.t())
    torch.testing.assert_close(scores, expected)


def test_images_guidance_and_modes(saved, processor):
    made, guided, _ = saved
    folder, answers = made["4t4i, threshold"]
    image = noise_images(1)[0]
    with engine(folder, max_logprobs=-1) as llm:
        config = llm.llm_engine.model_config.hf_config
        # an image in the prompt, through the multimodal processor, becomes the ids of the processor
        params = vllm.SamplingParams(temperature=0.0, max_tokens=len(answers[2].ids))
        prompt = {"prompt": "<image>", "multi_modal_data": {"image": image}}
        output = llm.generate([prompt, prompt], params, use_tqdm=False)
        assert output[0].prompt_token_ids == answers[2].prompt
        # the second is read from the cache of images
        assert [list(one.outputs[0].token_ids) for one in output] == [answers[2].ids] * 2
        written = guided_frame(engine_logprobs(llm), config, guided.prompt, guidance_scale=3.0)
        assert written == guided.ids
        unguided = next(answer for answer in answers if answer.mode == "image")
        assert written != unguided.ids
        # text is the default, and free is none
        sampled = vllm.SamplingParams(temperature=1.0, seed=0, max_tokens=40, ignore_eos=True)
        free = vllm.SamplingParams(
            temperature=1.0, seed=0, max_tokens=40, ignore_eos=True, extra_args={"generation_mode": "free"}
        )
        words = {"prompt_token_ids": answers[0].prompt}
        text_ids, free_ids = (
            set(llm.generate(words, each, use_tqdm=False)[0].outputs[0].token_ids) for each in (sampled, free)
        )
        codes = {processor.begin_image_token_id, processor.end_image_token_id, *processor.image_token_ids}
        assert not text_ids & codes and free_ids & codes
        with pytest.raises(VLLMValidationError, match="must be one of.*'image'.*got 'draw'"):
            llm.generate(words, vllm.SamplingParams(extra_args={"generation_mode": "draw"}), use_tqdm=False)


def test_prompts_in_chunks_and_rows_put_off_equal_generate(saved):
    folder, answers = saved[0]["4t4i, threshold"]
    # a step holds less than the longest prompt, and the cache 128 tokens: rows wait, and some have to begin again
    limits = {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 5, "block_size": 32, "disable_log_stats": False}
    with engine(folder, **limits) as llm:
        assert max(len(answer.prompt) for answer in answers) > 24
        assert ask(llm, answers) == [answer.ids for answer in answers]
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        assert metrics["vllm:num_preemptions"].value > 0


def test_what_cannot_run_is_refused_by_name(saved, tmp_path):
    with pytest.raises(ValueError, match="mixture of depths: `depth_layers` is \\[0\\]"):
        vllm.LLM(str(saved[2]), dtype="float32")
    folder, _ = saved[0]["1t1i"]
    with pytest.raises(ValueError, match="enable_prompt_embeds"):
        vllm.LLM(str(folder), dtype="float32", enable_prompt_embeds=True)
    with pytest.raises(ValueError, match="`pipeline_parallel_size` is 2"):
        vllm.LLM(str(folder), dtype="float32", pipeline_parallel_size=2)
    # vLLM asks for the code of a folder that its own backend shall run by itself
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name, file in installed_code().items():
        shutil.copyfile(file, tmp_path / name)
    with pytest.raises(ValueError, match="`model_impl` is 'transformers'"):
        vllm.LLM(str(tmp_path), dtype="float32", model_impl="transformers", trust_remote_code=True)
