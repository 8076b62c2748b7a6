"""Which precisions a device has units for."""

import platform

import torch


def has_bfloat16_units(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 in hardware (CUDA from 8.0 on, ROCm, AVX512-BF16, AMX, ARM's BF16)."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    if platform.machine() in ("arm64", "aarch64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
