# SPDX-License-Identifier: Apache-2.0
"""Names that the documentation mentioned before: each still imports, or the error says where it is now."""

import importlib
import re
from importlib.util import find_spec

import pytest

from modeling_moma.utils.moved_modules import MOVED, find_moved_modules


# those of the pages at commit 49b5149
DOCUMENTED = [
    "modeling_moma.AuxiliaryRouterTrainer",
    "modeling_moma.MomaCausalLMOutput",
    "modeling_moma.MomaConfig",
    "modeling_moma.MomaForCausalLM",
    "modeling_moma.MomaMetricsCallback",
    "modeling_moma.MomaModel",
    "modeling_moma.MomaPreTrainedModel",
    "modeling_moma.UpcyclingReceipt",
    "modeling_moma.add_auxiliary_routers",
    "modeling_moma.auxiliary_report",
    "modeling_moma.calibrate_auxiliary_thresholds",
    "modeling_moma.calibrate_thresholds",
    "modeling_moma.data.documents.TokenFolder",
    "modeling_moma.data.jobs.Job",
    "modeling_moma.data.jobs.plan_job",
    "modeling_moma.data.jobs.write_job",
    "modeling_moma.data.kinds.Alternative",
    "modeling_moma.data.kinds.CaptionKind",
    "modeling_moma.data.kinds.InterleavedKind",
    "modeling_moma.data.kinds.TextKind",
    "modeling_moma.data.packing.PackedCollator",
    "modeling_moma.data.packing.PackedExamples",
    "modeling_moma.data.pictures.LeftOut",
    "modeling_moma.data.pictures.read_picture",
    "modeling_moma.data.reports.write_manifest",
    "modeling_moma.data.running.run_tasks",
    "modeling_moma.data.sources.Source",
    "modeling_moma.data.sources.read_sources",
    "modeling_moma.data.stream.DocumentExamples",
    "modeling_moma.data.tokenizing.tokenize_shard",
    "modeling_moma.demo.examples.Examples",
    "modeling_moma.demo.page.build_page",
    "modeling_moma.demo.page.open_page",
    "modeling_moma.demo.studio.load_studio",
    "modeling_moma.eta",
    "modeling_moma.evaluation.measuring.MeasureSettings",
    "modeling_moma.evaluation.measuring.measure_sources",
    "modeling_moma.evaluation.report.report_tables",
    "modeling_moma.evaluation.sources.CaptionedPictures",
    "modeling_moma.evaluation.sources.HeldOutSource",
    "modeling_moma.export.image_tokenizer.OnnxImageTokenizer",
    "modeling_moma.export.image_tokenizer.export_image_tokenizer",
    "modeling_moma.flops_per_token",
    "modeling_moma.freeze_all_but",
    "modeling_moma.freeze_groups",
    "modeling_moma.initialize_code_embeddings",
    "modeling_moma.parse_experts",
    "modeling_moma.quantized_share",
    "modeling_moma.routing_moma.MomaRouter",
    "modeling_moma.serving_vllm.FrameGrammar",
    "modeling_moma.serving_vllm.FrameRow",
    "modeling_moma.serving_vllm.Verdict",
    "modeling_moma.serving_vllm.engine_logprobs",
    "modeling_moma.serving_vllm.guided_frame",
    "modeling_moma.serving_vllm.register",
    "modeling_moma.serving_vllm.server_logprobs",
    "modeling_moma.tools.costs.Eta",
    "modeling_moma.tools.layouts.Layout",
    "modeling_moma.tools.memory.training_memory",
    "modeling_moma.tools.planning.Hardware",
    "modeling_moma.tools.planning.Plan",
    "modeling_moma.tools.planning.plan_training",
    "modeling_moma.tools.traffic.training_traffic",
    "modeling_moma.torchao_config",
    "modeling_moma.training_flops",
    "modeling_moma.upcycle",
    "modeling_moma.upcycled_config",
    "modeling_moma.upcycling_receipt",
    "tokenization.DEFAULT_CHAT_TEMPLATE",
    "tokenization.ModalityCodec",
    "tokenization.MomaDataCollator",
    "tokenization.MomaImageProcessor",
    "tokenization.MomaImageProcessorPil",
    "tokenization.MomaProcessor",
    "tokenization.MomaVQConfig",
    "tokenization.MomaVQModel",
    "tokenization.MomaVQOutput",
    "tokenization.MomaVQPerceptualNetwork",
    "tokenization.add_modality_tokens",
    "tokenization.add_picture_tokens",
    "tokenization.augment_pictures",
    "tokenization.register_codec",
    "tokenization.train_text_tokenizer",
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_name_imports_or_says_the_new_one(name):
    module, _, attribute = name.rpartition(".")
    try:
        assert hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        (new,) = re.findall("is in `(.*)` now", str(error))
        # vLLM is not installed here
        assert new == "modeling_moma.serving.vllm" or hasattr(importlib.import_module(new), attribute)


@pytest.mark.parametrize("old", sorted(MOVED))
def test_every_new_name_is_a_module_and_no_old_one_is(old):
    assert find_spec(f"modeling_moma.{MOVED[old]}")
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"modeling_moma.{MOVED[old]}` now")):
        importlib.import_module(f"modeling_moma.{old}")


def test_other_names_are_missing_as_everywhere():
    find_moved_modules()
    with pytest.raises(ModuleNotFoundError, match="^No module named 'modeling_moma.nowhere'$"):
        importlib.import_module("modeling_moma.nowhere")
