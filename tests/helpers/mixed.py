# SPDX-License-Identifier: Apache-2.0
"""What the tests of trainers share: ragged examples of words and images, and what one step does to a model."""

from dataclasses import dataclass, field

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tokenization import MomaDataCollator, MomaProcessor


def mixed_examples(processor: MomaProcessor, rows: int = 12) -> list[dict]:
    """Words alone, an image after its caption, and an image before it, in turn; of different lengths.

    Captions before their images have no labels, so that the numbers of targets differ too.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(first, stop, length):
        return torch.randint(first, stop, (length,), generator=generator).tolist()

    offset = processor.image_token_offset
    examples = []
    for row in range(rows):
        words = [processor.tokenizer.bos_token_id, *draw(10, 200, 3 + 2 * row)]
        codes = draw(offset, offset + processor.codebook_size, processor.image_seq_length)
        image = [processor.begin_image_token_id, *codes, processor.end_image_token_id]
        if row % 3 == 0:
            examples.append({"input_ids": words, "labels": words})
        elif row % 3 == 1:
            examples.append({"input_ids": words + image, "labels": [-100] * len(words) + image})
        else:
            examples.append({"input_ids": image + words, "labels": image + words})
    return examples


def build_trainer(model, processor, output, examples=None, callbacks=(), trainer_class=Trainer, **fields) -> Trainer:
    """A trainer of single steps on the CPU that neither clips nor decays nor reports, unless `fields` say so."""
    defaults = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    examples = examples or mixed_examples(processor)
    return trainer_class(
        model=model,
        args=TrainingArguments(str(output), **{**defaults, **fields}),
        train_dataset=examples,
        eval_dataset=examples[:4],
        data_collator=MomaDataCollator(processor.tokenizer),
        callbacks=list(callbacks),
    )


@dataclass
class FirstStep(TrainerCallback):
    """Keeps the gradients before the first update."""

    gradients: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }


def losses(trainer: Trainer, key: str = "loss") -> list[float]:
    """What the trainer logged, step by step."""
    return [log[key] for log in trainer.state.log_history if key in log]


def copied_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as it is now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are not bit-equal."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
