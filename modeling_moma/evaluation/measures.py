# SPDX-License-Identifier: Apache-2.0
"""What a MoMa and its image tokenizer make of held-out rows: captions, drawings, reconstructions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from tokenization import MomaDataCollator
from tokenization.text_tokenizer_moma import with_beginning

from ..data.documents import shuffled_held_out
from ..data.stream import Documents
from ..hub.loading import open_model
from ..modeling_moma import MomaForCausalLM


if TYPE_CHECKING:
    from datasets import Dataset


# pixel values lie in [-1, 1]
VALUE_RANGE = 2.0


def psnr(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the PSNR in dB, `(batch,)`, of images `(batch, channels, height, width)` in [-1, 1]."""
    errors = (images - targets).pow(2).mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return 10 * torch.log10(VALUE_RANGE**2 / errors)


def image_batches(split: "Dataset", processor, batch_size: int, description: str) -> Iterator[torch.Tensor]:
    """Yield the pixel values of a split's images, with a progress bar."""
    for start in tqdm(range(0, len(split), batch_size), desc=description):
        images = split[start : start + batch_size]["image"]
        yield processor.image_processor(images, return_tensors="pt")["pixel_values"]


def load_model(
    folder: str, device: str | torch.device, dtype: Literal["float32", "bfloat16"] = "float32"
) -> MomaForCausalLM:
    """Return a model in eval mode."""
    return open_model(folder, dtype=getattr(torch, dtype)).to(device).eval()


def padded_batches(processor, examples: list[dict], batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Return the examples as inputs of the model, in their order."""
    collate = MomaDataCollator(processor.tokenizer)
    return [collate(examples[start : start + batch_size]) for start in range(0, len(examples), batch_size)]


def held_out_batches(documents: Sequence[Documents], processor, batch_size: int, seed: int) -> list[dict]:
    """Return held-out examples as padded batches of one size in random order."""
    examples = shuffled_held_out(documents, seed)
    num_full = len(examples) // batch_size * batch_size
    return padded_batches(processor, examples[: num_full or None], batch_size)


@torch.no_grad()
def write_captions(model, processor, codes: torch.Tensor, batch_size: int, max_new_tokens: int = 32) -> list[str]:
    """Caption images greedily."""
    texts = []
    for batch in tqdm(codes.split(batch_size), desc="captions"):
        ids = torch.tensor([with_beginning(processor.tokenizer, processor.image_ids(image)) for image in batch])
        ids = ids.to(model.device)
        with plain_generation(model):
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_mode="text",
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        texts += processor.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


@contextmanager
def plain_generation(model) -> Iterator[None]:
    """Let a model generate by the arguments of `generate` alone: what its own configuration says is no measure's."""
    own = model.generation_config
    ids = {name: getattr(own, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def draw_images(model, processor, captions: list[str], batch_size: int, sampling: dict, seed: int) -> torch.Tensor:
    """Draw an image for each caption; `<image>` and the like in one are the characters that they are."""
    torch.manual_seed(seed)
    texts = [processor.escape_special_tokens(caption) for caption in captions]
    codes = []
    for start in tqdm(range(0, len(texts), batch_size), desc="drawings"):
        inputs = processor(
            text=texts[start : start + batch_size],
            padding=True,
            padding_side="left",
            sanitize_control_tokens=True,
            return_tensors="pt",
        ).to(model.device)
        with plain_generation(model):
            output = model.generate(**inputs, generation_mode="image", **sampling)
        codes.append(model.decode_image_tokens(output).cpu())
    return torch.cat(codes)


@torch.inference_mode()
def encode_images(processor, batches: Iterator[torch.Tensor]) -> torch.Tensor:
    """Return the codes `[N, image_seq_length]` of images given in batches of pixel values."""
    device = processor.vq_model.device
    return torch.cat([processor.vq_model.get_image_tokens(batch.to(device)).cpu() for batch in batches])


@torch.inference_mode()
def decode_images(processor, codes: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield pixel values in [-1, 1] of coded images."""
    device = processor.vq_model.device
    for batch in codes.split(batch_size):
        yield processor.vq_model.decode_image_tokens(batch.to(device)).clamp(-1, 1).cpu()


def tokenizer_quality(processor, images: list[torch.Tensor], codes: torch.Tensor) -> dict[str, float]:
    """Return how well codes keep images, and how many codes do the work."""
    decoded = decode_images(processor, codes, len(images[0]))
    ratios = [psnr(found, batch) for found, batch in zip(decoded, images, strict=True)]
    shares = torch.bincount(codes.flatten(), minlength=processor.codebook_size).double() / codes.numel()
    used = shares[shares > 0]
    return {
        "psnr": torch.cat(ratios).mean().item(),
        "codes_used": used.numel(),
        "codebook_size": processor.codebook_size,
        "perplexity": (-(used * used.log()).sum()).exp().item(),
    }
