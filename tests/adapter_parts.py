"""Modules of adapter files with random weights, made by hand: real names and shapes, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_diffusion.formats.adapter_file import AdapterFile

Parts = dict[str, Tensor]

UNET = "lora_unet_down_blocks_1_attentions_0_"
Q, K = f"{UNET}transformer_blocks_0_attn1_to_q", f"{UNET}transformer_blocks_0_attn2_to_k"
PROJ_IN = f"{UNET}proj_in"
CONV = "lora_unet_down_blocks_1_resnets_0_conv1"
TE = "lora_te_text_model_encoder_layers_0_mlp_fc1"
LDM = "lora_unet_input_blocks_4_1_"
LDM_Q, LDM_K = f"{LDM}transformer_blocks_0_attn1_to_q", f"{LDM}transformer_blocks_0_attn2_to_k"
LDM_CONV = "lora_unet_input_blocks_4_0_in_layers_2"  # down_blocks.1.resnets.0.conv1
TE1, TE2 = "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_text_model_encoder_layers_31_mlp_fc2"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(
    outputs: int = 12, inputs: int = 8, rank: int = 4, *, kernel: Sequence[int] = (), alpha: float = 3.0, seed: int = 0
) -> Parts:
    ones = [1] * len(kernel)
    return {
        "lora_down.weight": randn(rank, inputs, *kernel, seed=seed),
        "lora_up.weight": randn(outputs, rank, *ones, seed=seed + 1),
        "alpha": torch.tensor(alpha),
    }


def tucker(outputs: int = 12, inputs: int = 8, rank: int = 4, *, seed: int = 0) -> Parts:
    return lora(outputs, inputs, rank, kernel=(1, 1), seed=seed) | {"lora_mid.weight": randn(rank, rank, 3, 3, seed=9)}


def loha(outputs: int = 12, columns: int = 8, rank: int = 2, *, alpha: float = 3.0) -> Parts:
    shapes = {"w1_a": (outputs, rank), "w1_b": (rank, columns), "w2_a": (outputs, rank), "w2_b": (rank, columns)}
    factors = {f"hada_{part}": randn(*shape, seed=seed) for seed, (part, shape) in enumerate(shapes.items())}
    return factors | {"alpha": torch.tensor(alpha)}


def loha_tucker(outputs: int = 12, inputs: int = 8, rank: int = 3) -> Parts:
    shapes = {"w1_a": (rank, outputs), "w1_b": (rank, inputs), "w2_a": (rank, outputs), "w2_b": (rank, inputs)}
    shapes |= {"t1": (rank, rank, 3, 3), "t2": (rank, rank, 3, 3)}
    factors = {f"hada_{part}": randn(*shape, seed=seed) for seed, (part, shape) in enumerate(shapes.items())}
    return factors | {"alpha": torch.tensor(3.0)}


def lokr(form: str, outputs: int = 12, inputs: int = 8, kernel: Sequence[int] = ()) -> Parts:
    """form: "whole", "factored", "tucker" for w2; "both" has w1 factored too. w1 is (3, 2)."""
    p, q, rank = outputs // 3, inputs // 2, 2
    parts: Parts = {"lokr_w1": randn(3, 2), "alpha": torch.tensor(5.0)}
    if form == "both":
        del parts["lokr_w1"]
        parts |= {"lokr_w1_a": randn(3, rank), "lokr_w1_b": randn(rank, 2, seed=1)}
    if form == "whole":
        return parts | {"lokr_w2": randn(p, q, *kernel, seed=2)}
    if form == "tucker":
        factors = {"lokr_w2_a": randn(rank, p, seed=2), "lokr_w2_b": randn(rank, q, seed=3)}
        return parts | factors | {"lokr_t2": randn(rank, rank, *kernel, seed=4)}
    columns = q * kernel[0] * kernel[1] if kernel else q
    return parts | {"lokr_w2_a": randn(p, rank, seed=2), "lokr_w2_b": randn(rank, columns, seed=3)}


def saved(
    path: Path,
    modules: Mapping[str, Parts],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    extra: Parts | None = None,
) -> Path:
    """Writes exactly these keys: "module.part"."""
    tensors = {f"{name}.{part}": tensor.to(dtype) for name, parts in modules.items() for part, tensor in parts.items()}
    save_file({key: tensor.contiguous() for key, tensor in (tensors | (extra or {})).items()}, path, metadata)
    return path


def read(path: Path, modules: Mapping[str, Parts], metadata: Mapping[str, str] | None = None) -> AdapterFile:
    return AdapterFile.read(saved(path, modules, metadata))


def sd1_modules() -> dict[str, Parts]:
    """Ranks and alphas of many kinds, one alpha in the text encoder; 768 wide, as SD 1.x is."""
    return {
        Q: lora(rank=4, alpha=1.5),
        K: lora(inputs=768, rank=2, alpha=2.0, seed=3),
        PROJ_IN: lora(12, 12, 3, kernel=(1, 1), alpha=1 / 3, seed=5),
        CONV: lora(12, 8, 5, kernel=(3, 3), alpha=7.0, seed=7),
        TE: lora(16, 8, 2, seed=11),
    }


def sdxl_modules(*, ldm: bool) -> dict[str, Parts]:
    return {
        LDM_Q if ldm else Q: lora(rank=4, alpha=1.5),
        LDM_K if ldm else K: lora(inputs=2048, rank=2, alpha=2.0, seed=3),
        LDM_CONV if ldm else CONV: lora(12, 8, 5, kernel=(3, 3), alpha=7.0, seed=7),
        TE1: lora(16, 8, 2, seed=11),
        TE2: lora(8, 16, 3, seed=13),
    }
