# SPDX-License-Identifier: Apache-2.0
"""How well an image tokenizer keeps held-out images: numbers, and a sheet to look at."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from tokenization.modeling_moma_vq import MomaVQModel
from tokenization.perceptual_moma_vq import MomaVQPerceptualNetwork

from ..evaluation.measures import VALUE_RANGE, psnr
from ..utils.atomic_files import atomic_write
from .image_store import to_pixel_values


# name of the distance in reports, never without what it is
PERCEPTUAL_DISTANCE = "perceptual distance (EfficientNet-lite0 features, not LPIPS)"
SAMPLES_FILE = "samples.png"
# images of the sheet, and pixels between them
NUM_SAMPLES, GAP = 8, 2
# constants of Wang et al. 2004: side and deviation of the window in pixels, and two stabilisers
SSIM_SIDE, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03
# images at once: so many, and so many pixels
EVALUATION_BATCH, EVALUATION_PIXELS = 128, 128 * 64 * 64


def ssim(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity, -1 to 1, of each image.

    It is the mean over its channels and over all places of a Gaussian window of 11 pixels (smaller where the image
    is) that lies within it.
    """
    channels = images.shape[1]
    # the formula compares brightness, which begins at 0
    images, targets = images + 1, targets + 1
    window = _gaussian(min(SSIM_SIDE, *images.shape[2:])).to(images)
    window = window.expand(channels, 1, -1, -1).contiguous()

    def local_mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values, window, groups=channels)

    mean, wanted = local_mean(images), local_mean(targets)
    variance = local_mean(images * images) - mean * mean
    wanted_variance = local_mean(targets * targets) - wanted * wanted
    covariance = local_mean(images * targets) - mean * wanted
    small1, small2 = (SSIM_K1 * VALUE_RANGE) ** 2, (SSIM_K2 * VALUE_RANGE) ** 2
    brightness = (2 * mean * wanted + small1) / (mean * mean + wanted * wanted + small1)
    structure = (2 * covariance + small2) / (variance + wanted_variance + small2)
    return (brightness * structure).mean(dim=(1, 2, 3))


def _gaussian(side: int) -> torch.Tensor:
    offsets = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    line = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    line = line / line.sum()
    return line[:, None] * line


def evaluation_batch(side: int) -> int:
    """Return the images of this side that are looked at at once."""
    return max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // side**2))


@torch.no_grad()
def evaluate(
    model: MomaVQModel,
    images: np.ndarray,
    targets: torch.Tensor | None = None,
    judge: MomaVQPerceptualNetwork | None = None,
    samples: Path | None = None,
) -> dict[str, float]:
    """Return what an image tokenizer makes of held-out images, in float32."""
    model.eval()
    sums: dict[str, float] = {}
    tokens, sheet = [], []
    shown = set(np.linspace(0, len(images) - 1, min(NUM_SAMPLES, len(images))).astype(int).tolist())
    batch_size = evaluation_batch(images.shape[-1])
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[start : start + batch_size])
        pixel_values = to_pixel_values(batch, model.device)
        output = model(pixel_values)
        found = output.reconstruction.clamp(-1, 1)
        means = {"psnr": psnr(found, pixel_values), "ssim": ssim(found, pixel_values)}
        if judge is not None:
            means[PERCEPTUAL_DISTANCE] = judge.distance(found, pixel_values).expand(len(batch))
        if targets is not None:
            wanted = targets[start : start + batch_size]
            means["semantic_cosine"] = F.cosine_similarity(output.semantic_prediction, wanted)
        for name, values in means.items():
            sums[name] = sums.get(name, 0.0) + values.double().sum().item()
        tokens.append(output.image_tokens)
        sheet += [(pixel_values[i], found[i]) for i in range(len(batch)) if start + i in shown]
    model.train()
    if samples is not None:
        save_samples(samples, sheet)
    codes = torch.cat(tokens)
    used = codes.unique().numel()
    return {
        **{name: total / len(images) for name, total in sums.items()},
        "perplexity": model.codebook_perplexity(codes).item(),
        "codes_used": used,
        "codes_used_share": used / model.config.num_embeddings,
    }


def save_samples(path: Path, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write images `(3, side, side)` in [-1, 1] in a row, the second of each pair below the first."""
    side = pairs[0][0].shape[-1]
    sheet = np.full((2 * (side + GAP) - GAP, len(pairs) * (side + GAP) - GAP, 3), 255, dtype=np.uint8)
    for column, pair in enumerate(pairs):
        for row, image in enumerate(pair):
            pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            top, left = row * (side + GAP), column * (side + GAP)
            sheet[top : top + side, left : left + side] = pixels
    atomic_write(path, lambda aside: Image.fromarray(sheet).save(aside, format="PNG"))
