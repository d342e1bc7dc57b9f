"""The weight changes of an adapter file as exact factors, without the base that it was made for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_diffusion.adapters.geometry import ALPHA, UP, Geometry
from lora_diffusion.adapters.lora import whole_down
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.tools.low_rank import khatri_rao_factors, kronecker_factors, svd_of_matrix, truncate

Factors = tuple[Tensor, Tensor]
"""(up (out, R), down (R, in·k·k)), float32, with ΔW = up @ down."""


def factors_of(parts: Mapping[str, Tensor], geometry: Geometry) -> Factors:
    """The exact factors of a module's ΔW, alpha in them; R is at most the smaller side, unless a LoRA's rank is above.

    Raises UserError for a DoRA, as what it changes depends on the weight it was trained on, and beyond float32.
    """
    if geometry.dora_axis is not None:
        raise UserError("a DoRA rescales the weight it was trained on, so without the base it has no change of its own")
    return direction_factors(parts, geometry)


def delta_of(parts: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
    """ΔW as a matrix (out, in·k·k), float32. Raises UserError for a DoRA."""
    up, down = factors_of(parts, geometry)
    return up @ down


def change_in(file: AdapterFile, name: str, *, direction_only: bool = False) -> Factors:
    """`factors_of` the module `name`, or `direction_factors`; errors name the file and the module."""
    factors = direction_factors if direction_only else factors_of
    try:
        return factors(file.modules[name], file.geometries[name])
    except UserError as error:
        raise UserError(f"{file.path}: {name}: {error}") from None


def refuse_dora(file: AdapterFile, what: str) -> None:
    """Raises UserError if the file holds a DoRA, for a tool that does `what` to changes."""
    dora = [name for name, geometry in file.geometries.items() if geometry.dora_axis is not None]
    if dora:
        raise UserError(
            f"{file.path}: cannot {what} a DoRA ({len(dora)} of {len(file.modules)} modules, such as {dora[0]}): it "
            "rescales the weight it was trained on, so without the base it has no change of its own. Use a LoRA, LoHa "
            "or LoKr file."
        )


def direction_factors(parts: Mapping[str, Tensor], geometry: Geometry) -> Factors:
    """As `factors_of`; of a DoRA the change inside it, before the weight is rescaled."""
    up, down = {"lora": _lora, "loha": _loha, "lokr": _lokr}[geometry.kind](parts)
    # Readers ignore the alpha of a LoKr without factors, which has no rank.
    scale = parts[ALPHA].item() / geometry.rank if geometry.rank and ALPHA in parts else 1.0
    if geometry.kind != "lora" and up.shape[1] > min(geometry.outputs, geometry.inputs):
        up, down = _trivial_factors(up @ down)
    up = up * scale
    if not (bool(torch.isfinite(up).all()) and bool(torch.isfinite(down).all())):
        raise UserError("its change is too large for float32. The file is damaged, or its training diverged")
    return up, down


def factors_of_matrix(delta: Tensor) -> Factors:
    """Factors of any matrix: as many as its rank, at most as the shorter side."""
    u, s, vh = svd_of_matrix(delta)
    return truncate(u, s, vh, max(1, int((s > 0).sum())))


def balanced(up: Tensor, down: Tensor, scale: float = 1.0) -> Factors:
    """The factors of scale · up @ down, float32, with the same norm on both sides: half precision holds those best.

    Each is multiplied with one number only. A scale of 0 gives zeros.
    """
    up, down = up.double(), down.double()
    norm_up, norm_down = up.square().sum().sqrt().item(), down.square().sum().sqrt().item()
    if scale == 0 or norm_up == 0 or norm_down == 0:
        return torch.zeros_like(up).float(), torch.zeros_like(down).float()
    each = math.sqrt(abs(scale) * norm_up * norm_down)
    return (up * math.copysign(each / norm_up, scale)).float(), (down * (each / norm_down)).float()


def _lora(parts: Mapping[str, Tensor]) -> Factors:
    return parts[UP].float().flatten(1), whole_down(parts).float().flatten(1)


def _loha(parts: Mapping[str, Tensor]) -> Factors:
    halves = [
        _with_core(parts[f"hada_w{half}_a"], parts[f"hada_w{half}_b"], parts.get(f"hada_t{half}")) for half in "12"
    ]
    (w1a, w1b), (w2a, w2b) = halves
    if w1a.shape[1] * w2a.shape[1] > min(w1a.shape[0], w1b.shape[1]):  # the exact factors may be huge: rank² columns
        return _trivial_factors((w1a @ w1b) * (w2a @ w2b))
    return khatri_rao_factors(w1a, w1b, w2a, w2b)


def _lokr(parts: Mapping[str, Tensor]) -> Factors:
    w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"].float() @ parts["lokr_w1_b"].float()
    if "lokr_w2" in parts:
        w2 = _trivial_factors(parts["lokr_w2"].float().flatten(1))
    else:
        w2 = _with_core(parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2"))
    return kronecker_factors(w1.float().flatten(1), *w2)


def _with_core(a: Tensor, b: Tensor, core: Tensor | None) -> Factors:
    """(m, r) and (r, n·k·k). With a Tucker core (r, r, k, k), a is (r, m) and b (r, n)."""
    if core is None:
        return a.float(), b.float()
    return a.float().T, torch.einsum("ijkl,jc->ickl", core.float(), b.float()).flatten(1)


def _trivial_factors(delta: Tensor) -> Factors:
    """A matrix times an identity, whose rank is the shorter side."""
    outputs, inputs = delta.shape
    return (torch.eye(outputs), delta) if outputs <= inputs else (delta, torch.eye(inputs))
