"""Where a model computes and in which number format, from what people say."""

from __future__ import annotations

import torch

from lora_diffusion.errors import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(name: str, said: str = '[run] device = "cuda"') -> torch.device:
    """`auto` is the GPU if there is one. said: how messages quote it. Raises UserError where CUDA is missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{said}, but torch finds no CUDA device. Use auto or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether `device` is a CPU with matrix units for bfloat16 (AMX), which `auto` leaves unused."""
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())  # pyright: ignore[reportPrivateUsage]


def resolve_precision(name: str, device: torch.device, said: str = '[run] precision = "fp16"') -> torch.dtype:
    """`auto` is bf16 on GPUs that have it, fp16 on older ones, fp32 on a CPU. said: how messages quote it."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name == "fp16" and device.type == "cpu":
        raise UserError(f"{said} overflows and is slow on a CPU. Use fp32, bf16 or auto.")
    return DTYPES[name]
