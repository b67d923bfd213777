# SPDX-License-Identifier: Apache-2.0
"""Contrast of captions with others' images, so that a model which has been trained draws what it is asked for.

Shape suffixes:
    B rows, S positions, N positions of all rows (`B * S`), P pairs of a caption and an image, at most, C codes of an
    image, V vocabulary.
"""

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from tokenization import MomaProcessor
from tokenization.text_tokenizer_moma import IMAGE
from tokenization.token_frames_moma import TokenFrame

from ..data.packing import IGNORED
from ..documents_moma import FLASH_LENGTHS
from ..errors_moma import InputError
from ..evaluation.losses import trains_by_expert_choice
from .recipe import ContrastFields
from .stage_trainer import StageTrainer


if TYPE_CHECKING:
    from peft import PeftModel


class Pairs(NamedTuple):
    """Captions of a batch and the images behind them, for as many as it could hold.

    Args:
        place_PC (`torch.Tensor`):
            positions of codes among all of the batch.
        is_pair_P (`torch.Tensor`):
            whether there is such a pair, and another image for it.
        right_PC (`torch.Tensor`):
            ids of the codes.
        wrong_PC (`torch.Tensor`):
            those of the image behind the next caption.
    """

    place_PC: torch.Tensor
    is_pair_P: torch.Tensor
    right_PC: torch.Tensor
    wrong_PC: torch.Tensor


class CaptionContrast:
    r"""Makes images likelier behind their own captions, and other images less likely there, than a reference has them.

    Condition contrastive alignment (CCA, [arXiv 2410.09347](https://arxiv.org/abs/2410.09347)), beside the loss of
    the training: with `r = log p(image | caption) - log p_reference(image | caption)` a caption costs
    `-log sigmoid(beta r) - wrong_weight log sigmoid(-beta r')`, `r'` that of another image behind it. The wrong pairs
    are the batch's own captions, each with the image behind the next one, so that every row keeps its length. It goes
    towards `p(image | caption) (p(image | caption) / p(image)) ** (1 / beta)`, which guidance draws from at twice the
    cost.

    Documents count that hold one image behind a caption. The sum over captions has the loss's own denominator, and is
    multiplied by `2 weight / (beta (1 + wrong_weight))`: at the beginning a nat of the right image and one of the
    wrong image together weigh as much as `weight` nats of the loss.

    Args:
        reference (`PreTrainedModel`):
            what the training begins at, in eval mode and on the device of its batches. Only read.
        fields ([`ContrastFields`]):
            of the recipe.
        frame (`TokenFrame`):
            of images.
        begin_of_text (`int`, *optional*):
            id that documents begin with, which is no caption.

    Raises:
        ValueError: images have no fixed number of codes.
    """

    def __init__(
        self,
        reference: "PreTrainedModel | PeftModel",
        fields: ContrastFields,
        frame: TokenFrame,
        begin_of_text: int | None,
    ):
        if frame.length is None:
            raise InputError(
                "RECIPE, contrast: images of one number of codes change places, and this processor's vary."
            )
        self.reference, self.fields, self.begin_of_text = reference, fields, begin_of_text
        self.begin_of_image, self.num_codes = frame.begin, frame.length

    def pairs(self, inputs: dict[str, torch.Tensor]) -> Pairs:
        """Return the pairs of a batch.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                `input_ids` of shape `(batch, length)`; documents begin where `position_ids`, if there are any, are 0,
                and each row is one otherwise; `attention_mask`, if there is one, is 0 at padding.
        """
        ids_BS, num_codes = inputs["input_ids"], self.num_codes
        positions_BS, mask_BS = inputs.get("position_ids"), inputs.get("attention_mask")
        arange_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        starts_BS = (arange_S == 0).expand_as(ids_BS) if positions_BS is None else positions_BS == 0
        document_BS = starts_BS.long().cumsum(1)
        start_BS = torch.where(starts_BS, arange_S, 0).cummax(1).values
        is_begin_BS = ids_BS == self.begin_of_image
        images_BD = ids_BS.new_zeros(len(ids_BS), ids_BS.shape[1] + 1)
        images_BS = images_BD.scatter_add(1, document_BS, is_begin_BS.long()).gather(1, document_BS)
        is_word_BS = (ids_BS != self.begin_of_text) & ~is_begin_BS
        if mask_BS is not None:
            is_word_BS &= mask_BS.bool()
        words_BS = is_word_BS.long().cumsum(1)
        before_BS = words_BS - (words_BS - is_word_BS.long()).gather(1, start_BS)
        is_whole_BS = arange_S + num_codes < ids_BS.shape[1]
        is_pair_N = (is_begin_BS & (images_BS == 1) & (before_BS > 0) & is_whole_BS).flatten()
        # how many there are would be waited for: as many as have room, those that are there first
        most = ids_BS.numel() // num_codes
        begin_P = is_pair_N.long().argsort(descending=True, stable=True)[:most]
        place_PC = begin_P[:, None] + 1 + torch.arange(num_codes, device=ids_BS.device)
        place_PC = place_PC.clamp(max=ids_BS.numel() - 1)
        number, arange_P = is_pair_N.sum(), torch.arange(len(begin_P), device=ids_BS.device)
        right_PC = ids_BS.flatten()[place_PC]
        wrong_PC = right_PC[(arange_P + 1) % number.clamp(min=1)]
        # the same drawing behind another caption is not wrong
        is_pair_P = (arange_P < number) & (right_PC != wrong_PC).any(1)
        return Pairs(place_PC, is_pair_P, right_PC, wrong_PC)

    def with_wrong_images(self, inputs: dict[str, torch.Tensor], pairs: Pairs) -> dict[str, torch.Tensor]:
        """Return a batch of twice the rows: behind its own the same ones with wrong images, without labels."""
        ids_BS = inputs["input_ids"]
        lengths = {name: values for name, values in inputs.items() if name in FLASH_LENGTHS}
        is_pair_PC = pairs.is_pair_P[:, None].expand_as(pairs.place_PC)
        # places that hold no pair write behind the end
        ids_N = F.pad(ids_BS.flatten(), (0, 1))
        place_PC = torch.where(is_pair_PC, pairs.place_PC, ids_BS.numel())
        wrong_BS = ids_N.scatter(0, place_PC.flatten(), pairs.wrong_PC.flatten())[:-1].view_as(ids_BS)
        doubled: dict[str, Any] = {name: values.repeat(2, 1) for name, values in inputs.items() if name not in lengths}
        for name, values in lengths.items():
            # begins of documents and the end of the last row, or the longest one's length
            is_length = isinstance(values, int)
            doubled[name] = values if is_length else torch.cat([values, values[1:] + ids_BS.numel()])
        doubled["input_ids"] = torch.cat([ids_BS, wrong_BS])
        if "labels" in inputs:
            doubled["labels"] = torch.cat([inputs["labels"], torch.full_like(inputs["labels"], IGNORED)])
        return doubled

    def log_ratios(
        self, doubled: dict[str, torch.Tensor], pairs: Pairs, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `r` of the right images and of the wrong ones, both of shape `(pairs,)`, 0 where there is no pair.

        Args:
            doubled (`dict[str, torch.Tensor]`):
                what `with_wrong_images` returns.
            pairs ([`Pairs`]):
                of the batch.
            logits (`torch.Tensor`):
                the trained model's, of shape `(2 * batch, length, vocabulary)`.
        """
        with torch.no_grad():
            others = {name: values for name, values in doubled.items() if name != "labels"}
            reference = self.reference(**others, use_cache=False).logits
            reference_2P = self._log_probs(reference, pairs)
        right_P, wrong_P = (self._log_probs(logits, pairs) - reference_2P).chunk(2)
        return right_P * pairs.is_pair_P, wrong_P * pairs.is_pair_P

    def _log_probs(self, logits: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Return the log-probabilities of right images and then of wrong ones, each in its half of the rows."""
        num_positions = logits.shape[0] * logits.shape[1] // 2
        before_PC = torch.where(pairs.is_pair_P[:, None], pairs.place_PC - 1, 0)
        before_2PC = torch.cat([before_PC, before_PC + num_positions])
        id_2PC = torch.cat([pairs.right_PC, pairs.wrong_PC])
        logits_MV = logits.flatten(0, 1)[before_2PC.flatten()].float()
        return -F.cross_entropy(logits_MV, id_2PC.flatten(), reduction="none").view_as(id_2PC).sum(1)

    def costs(self, right_P: torch.Tensor, wrong_P: torch.Tensor) -> torch.Tensor:
        """Return what each pair costs, by its `r` and `r'`, in units of the loss's nats."""
        beta, wrong_weight = self.fields.beta, self.fields.wrong_weight
        cost_P = F.softplus(-beta * right_P) + wrong_weight * F.softplus(beta * wrong_P)
        return 2 * self.fields.weight / (beta * (1 + wrong_weight)) * cost_P


class ContrastTrainer(StageTrainer):
    """A [`StageTrainer`] whose loss has the contrast of captions beside it.

    It logs, as means over the pairs since the last log: `contrast_loss`; `contrast_gap`, `r - r'` in nats; and
    `contrast_pairs` of a batch.

    Args:
        contrast ([`CaptionContrast`]):
            what it adds.
        args (`Any`):
            of a [`StageTrainer`].
        kwargs (`Any`):
            likewise.
    """

    def __init__(self, contrast: CaptionContrast, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        contrast.reference.to(self.args.device)  # pyright: ignore[reportArgumentType]
        self.contrast = contrast
        # what pairs cost, their gaps, their number and that of batches
        self._sums_4: torch.Tensor | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss, and in training the contrast beside it."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        pairs = self.contrast.pairs(inputs)
        doubled = self.contrast.with_wrong_images(inputs, pairs)
        loss, outputs = super().compute_loss(model, doubled, True, num_items_in_batch)
        right_P, wrong_P = self.contrast.log_ratios(doubled, pairs, outputs.logits)  # pyright: ignore[reportAttributeAccessIssue]
        cost_P = self.contrast.costs(right_P, wrong_P) * pairs.is_pair_P
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"] != IGNORED).sum()
        elif self.args.average_tokens_across_devices:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        loss = loss + cost_P.sum() / num_items_in_batch
        sums = (cost_P.sum(), (right_P - wrong_P).sum(), pairs.is_pair_P.sum(), right_P.new_ones(()))
        sums_4 = torch.stack([value.detach().float() for value in sums])
        self._sums_4 = sums_4 if self._sums_4 is None else self._sums_4 + sums_4
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        """Log, with the figures of the contrast."""
        if "loss" in logs and self._sums_4 is not None:
            sums_4: Any = self.accelerator.reduce(self._sums_4)
            self._sums_4 = None
            loss, gap, number, batches = sums_4.tolist()
            logs["contrast_pairs"] = number / batches
            if number:
                logs |= {"contrast_loss": loss / number, "contrast_gap": gap / number}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs):
        """Return the FLOPs of a batch and its wrong images: three forwards each, and one of the reference."""
        return super().floating_point_ops(inputs) * 8 // 3

    def _spares_logits(self, inputs: dict[str, torch.Tensor]) -> bool:
        # the contrast reads them
        return not self.model.training and super()._spares_logits(inputs)


def caption_contrast(
    model: "PreTrainedModel | PeftModel", folder: str | None, fields: ContrastFields, processor: MomaProcessor
) -> CaptionContrast:
    """Return the contrast of a model, whose copy is the reference.

    Args:
        model (`PreTrainedModel`):
            as the training begins.
        folder (`str | None`):
            where its weights come from.
        fields ([`ContrastFields`]):
            of the recipe.
        processor ([`MomaProcessor`]):
            whose ids are trained on.

    Raises:
        ValueError: it has new weights, or trains by a routing that sees the future.
    """
    if not folder:
        raise InputError(
            "RECIPE, contrast: it compares with the model that a training begins at, which is a trained one: "
            "give `--model`."
        )
    if trains_by_expert_choice(model):
        raise InputError(
            f"RECIPE, contrast: `--model` {folder!r} trains by 'expert_choice', under which a token's probability "
            "depends on tokens behind it. `training_routing` and `depth_training_routing` in its config.json may be "
            "'token_choice' or 'threshold'."
        )
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    begin_of_text: Any = processor.tokenizer.bos_token_id
    return CaptionContrast(reference, fields, processor.frames[IMAGE], begin_of_text)


__all__ = ["CaptionContrast", "ContrastTrainer", "caption_contrast"]
