"""What a module of an adapter file adds to its layer's weight, as exact low-rank factors and as a matrix.

ΔW (out, in·k·k) has alpha / rank in it; a convolution's kernel is flattened into the columns. A DoRA's ΔW depends on
the frozen weight and is not computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_diffusion.adapters.geometry import ALPHA, UP, Geometry
from lora_diffusion.adapters.lora import whole_down
from lora_diffusion.tools.low_rank import khatri_rao_factors, kronecker_factors, svd_of_matrix, truncate

Parts = Mapping[str, Tensor]


def factors_of(parts: Parts, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """(up (out, R), down (R, in·k·k)) in float32 whose product is ΔW, with entries of like size in both.

    R is the rank of a LoRA, rank² for a LoHa, the rank of the Kronecker product for a LoKr, and never more than the
    smaller side of the layer. Raises ValueError for a DoRA.
    """
    up, down = {"lora": _lora, "loha": _loha, "lokr": _lokr}[_kind(geometry)](parts)
    if up.shape[1] > min(geometry.outputs, geometry.inputs):
        up, down = factors_of_matrix(up.double() @ down.double())
    return balanced(up, down, _scale(parts, geometry))


def delta_of(parts: Parts, geometry: Geometry) -> Tensor:
    """ΔW (out, in·k·k), float32. Raises ValueError for a DoRA."""
    up, down = {"lora": _lora, "loha": _loha_halves, "lokr": _lokr}[_kind(geometry)](parts)
    if geometry.kind == "loha":
        return (_scale(parts, geometry) * up * down).float()
    return (_scale(parts, geometry) * (up.double() @ down.double())).float()


def factors_of_matrix(delta: Tensor) -> tuple[Tensor, Tensor]:
    """(up, down) of the smaller side's size, or of the rank if that is less: exact for any matrix."""
    u, s, vh = svd_of_matrix(delta)
    return truncate(u, s, vh, max(1, int((s > 0).sum())))


def balanced(up: Tensor, down: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The factors of scale · up @ down, float32, with the same norm on both sides: half precision holds those best.

    Each is multiplied with one number only. A scale of 0 gives zeros.
    """
    up, down = up.double(), down.double()
    norm_up, norm_down = float(torch.linalg.vector_norm(up)), float(torch.linalg.vector_norm(down))
    if scale == 0 or norm_up == 0 or norm_down == 0:
        return torch.zeros_like(up).float(), torch.zeros_like(down).float()
    each = math.sqrt(abs(scale) * norm_up * norm_down)
    return (up * math.copysign(each / norm_up, scale)).float(), (down * (each / norm_down)).float()


def _kind(geometry: Geometry) -> str:
    if geometry.dora_axis is not None:
        raise ValueError("a DoRA's change depends on the frozen weight")
    return geometry.kind


def _scale(parts: Parts, geometry: Geometry) -> float:
    """The alpha over the rank; 1 without alpha, and for a LoKr of which nothing is factored."""
    return parts[ALPHA].item() / geometry.rank if ALPHA in parts and geometry.rank else 1.0


def _lora(parts: Parts) -> tuple[Tensor, Tensor]:
    return parts[UP].float().flatten(1), whole_down(parts).float().flatten(1)


def _loha(parts: Parts) -> tuple[Tensor, Tensor]:
    return khatri_rao_factors(*_loha_half(parts, "1"), *_loha_half(parts, "2"))


def _loha_halves(parts: Parts) -> tuple[Tensor, Tensor]:
    """The two matrices (out, in·k·k) that are multiplied entry by entry."""
    (a1, b1), (a2, b2) = _loha_half(parts, "1"), _loha_half(parts, "2")
    return a1.double() @ b1.double(), a2.double() @ b2.double()


def _loha_half(parts: Parts, half: str) -> tuple[Tensor, Tensor]:
    """(out, r) and (r, in·k·k); a Tucker core becomes part of the second."""
    a, b = parts[f"hada_w{half}_a"].float(), parts[f"hada_w{half}_b"].float()
    if (core := parts.get(f"hada_t{half}")) is None:
        return a, b
    return a.T, torch.einsum("ijkl,jc->ickl", core.float(), b).flatten(1)


def _lokr(parts: Parts) -> tuple[Tensor, Tensor]:
    w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"].float() @ parts["lokr_w1_b"].float()
    if "lokr_w2" in parts:
        w2a, w2b = factors_of_matrix(parts["lokr_w2"].float().flatten(1))
    elif (core := parts.get("lokr_t2")) is not None:
        w2a = parts["lokr_w2_a"].float().T
        w2b = torch.einsum("ijkl,jq->iqkl", core.float(), parts["lokr_w2_b"].float()).flatten(1)
    else:
        w2a, w2b = parts["lokr_w2_a"].float(), parts["lokr_w2_b"].float()
    return kronecker_factors(w1.float().flatten(1), w2a, w2b)
