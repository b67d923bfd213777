# SPDX-License-Identifier: Apache-2.0
"""Whether a device computes in bf16 rather than imitates it."""

import torch


def supports_bf16(device: str | torch.device) -> bool:
    """Whether the device computes in bfloat16 itself; elsewhere it is emulated and slow."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
