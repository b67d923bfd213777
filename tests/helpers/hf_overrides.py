# SPDX-License-Identifier: Apache-2.0
"""Every test of Transformers that we override or skip, each with its reason. There are no others.

What the suites skip by themselves (no accelerator, no Flash Attention, no video, no audio) is not listed.
"""

import json
import subprocess
from unittest.mock import patch

import torch
from transformers import set_seed

from helpers.slow import RUN_SLOW
from modeling_moma import token_groups_moma
from tokenization import MomaVQModel


class Overrides:
    """
    Attributes:
        skipped: reasons by name of a test; a parametrised test goes by its name before the parameters.
        slow: the same, of what runs where `RUN_SLOW` is 1.
    """

    skipped: dict[str, str] = {}
    slow: dict[str, str] = {}

    def setUp(self):
        super().setUp()
        slow = {} if RUN_SLOW else self.slow
        slow = {name: f"slow, RUN_SLOW=1 runs it: {reason}" for name, reason in slow.items()}
        for name, reason in {**self.skipped, **slow}.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)

    def test_every_skip_names_a_test_of_the_suite(self):
        for name in (*self.skipped, *self.slow):
            self.assertTrue(any(attribute.startswith(name) for attribute in dir(self)), name)


class MomaOverrides(Overrides):
    """For every configuration of the model.

    Attributes:
        training_overfit_steps: of the suite, which takes 300 of a third of the learning rate. After 100 the
            rounding of a CPU decides whether every token is learnt.
        training_overfit_learning_rate: of the suite.
    """

    training_overfit_steps = 200
    training_overfit_learning_rate = 3e-3

    def setUp(self):
        super().setUp()
        # the test wants outputs of an unscaled model beyond max_position_embeddings to compare a scaled one with; ours
        # refuses them with a ValueError
        if self._testMethodName.startswith("test_model_rope_scaling_from_config"):
            lifted = patch.object(token_groups_moma, "check_batch", _check_if_scaled(token_groups_moma.check_batch))
            lifted.start()
            self.addCleanup(lifted.stop)


def _check_if_scaled(check):
    def checked(config, *args):
        if config.rope_parameters["rope_type"] != "default":
            check(config, *args)

    return checked


class ExpertGroupsOverrides(MomaOverrides):
    """For groups of experts without depth."""

    slow = {"test_bc_torch_dtype": "fourteen loads: DepthModelTest runs it"}
    skipped = {
        "test_keep_in_fp32_modules_exist": "it asks for all names on the list, and depth routers are among them: "
        "DepthModelTest runs it",
    }


class DenseOverrides(MomaOverrides):
    """For one expert for all tokens and no depth: nothing has a router. The other classes run these."""

    slow = {"test_bc_torch_dtype": "fourteen loads: DepthModelTest runs it"}
    skipped = {
        "test_eager_matches_batched_and_grouped_inference": "a single expert is a plain FFN outside that interface",
        "test_keep_in_fp32_modules_exist": "the list names the routers, and there are none",
        "test_output_router_logits_from_config": "there is no router to have logits",
    }


class DepthOverrides(MomaOverrides):
    """For configurations with depth layers. Nothing is skipped."""

    def test_retain_grad_hidden_states_attentions(self):
        """A depth layer multiplies with the weights of its packed tokens, and returns a copy of them laid out over all
        positions, through which no gradient flows. The test looks at layer 0, so depth moves to layer 1."""
        self.model_tester.fields = {**self.model_tester.fields, "depth_layers": [1]}
        super().test_retain_grad_hidden_states_attentions()


class VQOverrides(Overrides):
    """For every configuration of the VQ model.

    Attributes:
        has_attentions: for the suite, whether there is attention of Transformers' interface, which can be switched and
            returned. Here it is a block among convolutions that always calls SDPA.
        test_resize_embeddings: for the suite, whether the vocabulary can grow. The codebook is trained whole.
    """

    has_attentions = False
    test_resize_embeddings = False
    skipped = {
        "test_hidden_states_output": "the output has none: between convolutions their shapes differ",
        "test_model_get_set_embeddings": "its input is pixels, which no embedding table reads",
        "test_retain_grad_hidden_states_attentions": "the output has neither of them",
    }


class AveragedVQOverrides(VQOverrides):
    """For codebooks that follow moving averages."""

    slow = {"test_bc_torch_dtype": "fourteen loads: ChameleonVQModelTest runs it"}

    def test_init_weights_can_init_buffers(self):
        """The averages begin at the random codebook, so they differ from one model to the next."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        with torch.device("meta"):
            quantize = (model := MomaVQModel(config)).quantize
        model.to_empty(device="cpu")
        model.init_weights()
        self.assertTrue(torch.equal(quantize.ema_sum, quantize.embedding.weight))
        self.assertTrue((quantize.ema_count == 1).all())


class ImageProcessorOverrides(Overrides):
    """For both backends."""

    def test_pil_can_run_without_torchvision(self):
        """The process that it starts must import this package before an auto class knows its classes."""
        run = subprocess.run

        def run_with_package(command, **kwargs):
            python, option, script, *arguments = command
            blocked = 'sys.modules["torchvision"] = None'
            self.assertIn(blocked, script)
            script = script.replace(blocked, f"{blocked}; import modeling_moma")
            return run([python, option, script, *arguments], **kwargs)

        with patch("subprocess.run", run_with_package):
            super().test_pil_can_run_without_torchvision()


class ProcessorOverrides(Overrides):
    """For the processor. Its VQ model is no part that the suite knows, and pixels never leave it."""

    def prepare_images_inputs(self, *args, **kwargs):
        """Remembers the images for the check below."""
        self.images = super().prepare_images_inputs(*args, **kwargs)
        return self.images

    def _check_modality_outputs(self, inputs, modality):
        """The suite looks for negative pixels to see whether `rescale_factor=-1` was heeded. Here the codes tell."""
        processor = self.get_processor()
        first, stop = processor.image_token_offset, processor.image_token_offset + processor.codebook_size
        codes = [[token - first for token in row if first <= token < stop] for row in inputs["input_ids"].tolist()]
        self.assertEqual(codes, processor.encode_images(self.images, rescale_factor=-1.0))
        self.assertNotEqual(codes, processor.encode_images(self.images))

    def _count_embed_tokens(self, processor, inputs, modality):
        """The suite, since Transformers 5.25, counts the token that an image's text repeats the most. Codes differ."""
        entries = [entry for row in inputs["text_replacement_offsets"] for entry in row if entry["type"] == modality]
        first, stop = processor.image_token_offset, processor.image_token_offset + processor.codebook_size
        rows = [processor.tokenizer.encode(entry["replacement"]) for entry in entries]
        return [sum(first <= token < stop for token in row) for row in rows]

    def test_processor_to_json_string(self):
        """The test looks for all arguments in the JSON text, where weights have no place."""
        self.prepare_processor_dict = dict
        super().test_processor_to_json_string()
        self.assertNotIn("vq_model", json.loads(self.get_processor().to_json_string()))

    def test_tokenizer_decode_defaults(self):
        """The test leaves out `prepare_processor_dict()`, and with it the VQ model."""

        class ProcessorWithVQModel(self.processor_class):
            def __init__(processor, image_processor, tokenizer):
                super().__init__(image_processor, tokenizer, **self.prepare_processor_dict())

        self.processor_class = ProcessorWithVQModel
        super().test_tokenizer_decode_defaults()


class TokenizersBackendOverrides(Overrides):
    """For the tokenizer, whose class `PreTrainedTokenizerFast` is Transformers' own."""

    skipped = {
        "test_rust_tokenizer_add_prefix_space_0": "that class keeps the pre-tokenizer of tokenizer.json as it is; "
        "classes of single models overwrite it",
    }


class ParallelOverrides(Overrides):
    """For tensor parallelism, expert parallelism and FSDP.

    Attributes:
        overridden: fields of the config by name of a test.
    """

    skipped = {
        "test_fsdp2_expert_parallel_2d_vs_ddp": "over its 20 steps of Adam, rounding moves some token to another "
        "expert; tests/modeling/test_parallel.py compares the same mesh step by step",
    }
    slow = {
        "test_hsdp_grad_accumulation_vs_single_device_1": "two processes of the mesh that case 0 has four of",
        "test_hsdp_grad_accumulation_vs_single_device_2": "eight processes; tests/modeling/test_parallel.py has "
        "experts on a mesh of shards",
        "test_hsdp_save_load": "four processes; test_fsdp2_save_load has two",
    }
    overridden: dict[str, dict] = {
        # it compares with one process that has the batches of all, in which more tokens compete; so each chooses alone
        "test_hsdp_grad_accumulation_vs_single_device": {
            "training_routing": "token_choice",
            "router_bias_update_rate": 0.0,
        },
    }

    def setUp(self):
        super().setUp()
        # on some CPUs MKL sums in another order where weights are aligned otherwise, as those of a file and of shards
        # are, and over 20 steps of Adam that moves a token to another expert
        sums = patch.dict("os.environ", MKL_CBWR="AVX2,STRICT")
        sums.start()
        self.addCleanup(sums.stop)
        # the suite wants a core for each process, and would skip what needs four of them on a smaller machine
        cores = patch("os.cpu_count", return_value=8)
        cores.start()
        self.addCleanup(cores.stop)
        for name, fields in self.overridden.items():
            if self._testMethodName.startswith(name):
                self.fields = {**self.fields, **fields}


class DepthParallelOverrides(ParallelOverrides):
    """For configurations with depth layers. Nothing more is skipped."""

    def test_tp_generation_quantized(self):
        """It wants nearly the same greedy tokens of weights that were rounded to float8 whole and in shards.

        A score of the untrained depth router lies within that rounding of its threshold for the test's own seed.
        """
        with patch("transformers_common_tests.test_tensor_parallel_mixin.set_seed", lambda seed: set_seed(seed + 2)):
            super().test_tp_generation_quantized()


class DenseParallelOverrides(ParallelOverrides):
    """For one expert for all tokens and no depth."""

    slow = {
        **ParallelOverrides.slow,
        **dict.fromkeys(("test_fsdp2", "test_hsdp"), "its plan of shards is a part of that of DepthParallelTest"),
    }
    # float8 rounds each shard by a scale of its own, and with the usual range two tokens are too close for that
    overridden = {**ParallelOverrides.overridden, "test_tp_generation_quantized": {"initializer_range": 0.1}}
