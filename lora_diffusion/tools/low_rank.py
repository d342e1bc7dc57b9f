"""Weight changes as matrices: their singular values, shorter factors for them, their angles and their mixtures.

A change of a layer is ΔW (m, n) = up (m, r) @ down (r, n); a convolution's kernel is flattened into n. Matrices come in
and go out as float32; what is subtracted or squared on the way is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Svd = tuple[Tensor, Tensor, Tensor]
"""U (m, k), S (k,), Vh (k, n) with U·diag(S)·Vh = ΔW; S falls. S is float64: errors are differences of its squares."""

_NEGLIGIBLE = 2.0**-24  # of the largest singular value: half a unit in the last place of float32


def svd_of_factors(up: Tensor, down: Tensor) -> Svd:
    """The SVD of up @ down, k = min(m, R, n), without forming the product.

    With QR decompositions up = Q₁R₁ and downᵀ = Q₂R₂ only R₁R₂ᵀ, at most R × R, is left to decompose.
    """
    left, left_core = torch.linalg.qr(up.double())
    right, right_core = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return _with_fixed_signs(left @ u, s, vh @ right.T)


def singular_values_of_factors(up: Tensor, down: Tensor) -> Tensor:
    """The singular values of up @ down alone, float64, falling; those that are missing at the end are 0."""
    if is_dense_quicker(up, down):
        delta = up.double() @ down.double()
        gram = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
        s = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
        return s * (s > _NEGLIGIBLE * s[0])
    left_core = torch.linalg.qr(up.double(), mode="r").R
    right_core = torch.linalg.qr(down.double().T, mode="r").R
    return torch.linalg.svdvals(left_core @ right_core.T)


def is_dense_quicker(up: Tensor, down: Tensor) -> bool:
    """Whether the product is quicker to decompose than the factors; eigenvectors cost a fraction of an SVD."""
    return up.shape[1] > min(up.shape[0], down.shape[1]) // 4


def svd_of_matrix(delta: Tensor, rank: int | None = None) -> Svd:
    """The SVD of `delta` (m, n), its `rank` largest parts or all: k = min(rank, m, n).

    From the eigenvectors of the Gram matrix of the shorter side. In float64 its squaring costs nothing that float32
    could show: parts below 6e-8 of the largest come out as exact zeros, with zeros on the longer side's vectors.
    """
    if delta.shape[0] > delta.shape[1]:
        u, s, vh = svd_of_matrix(delta.T, rank)
        return _with_fixed_signs(vh.T, s, u.T)
    wide = delta.double()
    count = min(delta.shape[0], rank if rank is not None else delta.shape[0])
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(1)[:, :count]  # eigh's values rise
    projected = vectors.T @ wide  # (count, n): row i is σᵢ·vᵢ
    lengths, order = torch.linalg.vector_norm(projected, dim=1).sort(descending=True, stable=True)
    is_there = lengths > (_NEGLIGIBLE * lengths[0] if count else 0.0)
    s = lengths * is_there
    vh = projected[order] * torch.where(is_there, 1 / lengths, 0.0)[:, None]
    return _with_fixed_signs(vectors[:, order], s, vh)


def truncate(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (up, down) of the `rank` largest parts, or of all if there are fewer; √S goes to each side."""
    root = s[:rank].double().sqrt()
    return (u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()


def rank_for_energy(s: Tensor, energy: float) -> int:
    """The smallest rank, at least 1, whose squared singular values hold the share `energy` in (0, 1] of all of `s`."""
    _check_share("energy", energy)
    held = s.double().square().cumsum(0)
    if not len(held) or held[-1] == 0:
        return 1
    return int((held < energy * held[-1]).sum()) + 1


def relative_error(s: Tensor, rank: int, total_norm: float) -> float:
    """‖ΔW − its best approximation of `rank`‖ / ‖ΔW‖, Frobenius; `s` may be only the beginning of the spectrum.

    total_norm: ‖ΔW‖. 0 for ΔW = 0.
    """
    if total_norm == 0:
        return 0.0
    squares = s.double().square()
    beyond = max(0.0, total_norm**2 - float(squares.sum()))
    return math.sqrt(float(squares[rank:].sum()) + beyond) / total_norm


def effective_rank(s: Tensor) -> float:
    """How many singular values matter: the exponential of the entropy of their shares; 0 for ΔW = 0.

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1.
    """
    total = s.double().sum()
    if total == 0:
        return 0.0
    return math.exp(float(torch.special.entr(s.double() / total).sum()))


def inner_product(up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> float:
    """⟨up1 @ down1, up2 @ down2⟩, the sum of the products of their entries, without forming the products."""
    return float(((up1.double().T @ up2.double()) * (down1.double() @ down2.double().T)).sum())


def frobenius_norm_of_factors(up: Tensor, down: Tensor) -> float:
    """‖up @ down‖ without forming the product."""
    return math.sqrt(max(0.0, inner_product(up, down, up, down)))


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """The changes merged by trimming, electing a sign and averaging what agrees with it.

    The paper's task vectors are here weight · ΔW: each keeps its share `density` in (0, 1] of largest entries; each
    place takes the sign of the larger sum; the result is the mean of the kept entries of that sign, 0 where the sums
    are equal. So one change alone with density 1 gives weight · ΔW, and a negative weight subtracts.
    TIES-merging, Yadav et al. 2023 (arXiv:2306.01708), section 4.
    """
    _check_mixture(deltas, weights, density)
    trimmed = [_largest(weight * delta.float(), density) for delta, weight in zip(deltas, weights, strict=True)]
    elected = torch.zeros_like(trimmed[0], dtype=torch.float64)
    for t in trimmed:
        elected += t
    elected.sign_()
    total, count = torch.zeros_like(trimmed[0]), torch.zeros_like(trimmed[0])
    for t in trimmed:
        agrees = (t * elected) > 0
        total += t * agrees
        count += agrees
    return total / count.clamp(min=1)


def dare(deltas: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """The weighted sum of the changes, each with entries dropped at random and the rest scaled by 1 / density.

    Each entry stays with probability `density` in (0, 1], so the expectation is Σ weight · ΔW. generator: one per
    layer, `stream(seed, "dare", module)`; masks are drawn from it in the order of `deltas`.
    DARE, Yu et al. 2023 (arXiv:2311.03099), section 3.
    """
    _check_mixture(deltas, weights, density)
    total = torch.zeros_like(deltas[0], dtype=torch.float32)
    for delta, weight in zip(deltas, weights, strict=True):
        is_kept = torch.rand(delta.shape, generator=generator) < density
        total += (weight / density) * delta.float() * is_kept.to(delta.device)
    return total


def khatri_rao_factors(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> tuple[Tensor, Tensor]:
    """(up, down) of rank r₁·r₂ with up @ down = (w1a @ w1b) ⊙ (w2a @ w2b): the exact factors of a LoHa.

    w1a: (m, r₁), w1b: (r₁, n), w2a: (m, r₂), w2b: (r₂, n).
    """
    up = w1a.float()[:, :, None] * w2a.float()[:, None, :]  # (m, r₁, r₂)
    down = w1b.float()[:, None, :] * w2b.float()[None, :, :]  # (r₁, r₂, n)
    return up.flatten(1), down.flatten(0, 1)


def kronecker_factors(w1: Tensor, w2a: Tensor, w2b: Tensor) -> tuple[Tensor, Tensor]:
    """(up, down) of rank q·r with up @ down = w1 ⊗ (w2a @ w2b), q = rank of w1: the exact factors of a LoKr.

    w1: (a, b), w2a: (c, r), w2b: (r, d); up: (a·c, q·r), down: (q·r, b·d). A full second matrix needs factors first:
    `truncate(*svd_of_matrix(w2), rank)`.
    """
    u, s, vh = svd_of_matrix(w1)
    w1a, w1b = truncate(u, s, vh, max(1, int((s > 0).sum())))
    pairs = (w1a, w2a), (w1b, w2b)
    up, down = (torch.kron(one.contiguous(), two.float().contiguous()) for one, two in pairs)  # kron needs it so
    return up, down


def _with_fixed_signs(u: Tensor, s: Tensor, vh: Tensor) -> Svd:
    """The largest entry of each column of U is positive, so that the same matrix gives the same factors."""
    u, vh = u.double(), vh.double()
    signs = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0).to(u)
    return (u * signs).float(), s, (signs[:, None] * vh).float()


def _largest(delta: Tensor, density: float) -> Tensor:
    """`delta` with all but its share `density` of largest entries set to 0."""
    count = max(1, round(density * delta.numel()))
    if count >= delta.numel():
        return delta
    flat = delta.flatten()
    places = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).scatter_(0, places, flat[places]).view_as(delta)


def _check_mixture(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> None:
    _check_share("density", density)
    if not deltas or len({delta.shape for delta in deltas}) != 1 or len(weights) != len(deltas):
        raise ValueError("a mixture needs changes of one shape and a weight for each")


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}, should be above 0 and at most 1")
