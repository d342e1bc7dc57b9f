"""How the two factors of a low-rank change start. Whatever the start, the layer begins as it was.

Either the second factor is 0, or the start itself is taken off again for as long as the adapter lives
(`LoRA.start_down`, `LoRA.start_up`).
"""

# Strict checking is of no use where torch lacks annotations.
# pyright: basic

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Init:
    """fill(down, up, weight, scale, generator) fills both factors in place.

    down: (rank, in, …), up: (out, rank, …), float32. weight: the frozen layer's, float32, (out, in, …), where
    `needs_weight`. scale: alpha / rank. Such a start has an effect, which the adapter takes off.
    """

    fill: Callable[[Tensor, Tensor, Tensor, float, torch.Generator], None]
    needs_weight: bool = False


def kaiming(down: Tensor, up: Tensor, weight: Tensor, scale: float, generator: torch.Generator) -> None:
    """Uniform within ±1/√fan_in, as torch starts a Linear or Conv2d (He et al. 2015, arXiv:1502.01852, a = √5)."""
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    nn.init.zeros_(up)


def gaussian(down: Tensor, up: Tensor, weight: Tensor, scale: float, generator: torch.Generator) -> None:
    """Normal with standard deviation 1/rank, as PEFT's `init_lora_weights="gaussian"`."""
    nn.init.normal_(down, std=1 / down.shape[0], generator=generator)
    nn.init.zeros_(up)


def pissa(down: Tensor, up: Tensor, weight: Tensor, scale: float, generator: torch.Generator) -> None:
    """The principal singular vectors: scale · up · down is the best rank-r part of the weight.

    Meng et al. 2024 (arXiv:2404.02948), equations 2 and 3.
    """
    u, s, vh = principal_svd(weight.flatten(1), down.shape[0], generator)
    root = (s / scale).sqrt()
    up.copy_((u * root).reshape(up.shape))
    down.copy_((root[:, None] * vh).reshape(down.shape))


def olora(down: Tensor, up: Tensor, weight: Tensor, scale: float, generator: torch.Generator) -> None:
    """The first columns of Q and rows of R of the weight's QR decomposition (Büyükakyüz 2024, arXiv:2406.01775)."""
    rank = _checked_rank(weight.flatten(1), down.shape[0])
    q, r = torch.linalg.qr(weight.flatten(1))
    up.copy_(q[:, :rank].reshape(up.shape))
    down.copy_(r[:rank].reshape(down.shape))


INITS: dict[str, Init] = {
    "default": Init(kaiming),
    "gaussian": Init(gaussian),
    "pissa": Init(pissa, needs_weight=True),
    "olora": Init(olora, needs_weight=True),
}

_OVERSAMPLING = 16
_POWER_ITERATIONS = 8
_SMALL = 256  # a shorter side up to here is decomposed exactly: that is as fast


def principal_svd(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triples (U (m, r), S (r,), Vh (r, n)) of a matrix (m, n), float32.

    Large matrices by subspace iteration from a random start (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4), which
    is some ten times faster; the part found holds as much as the best one to well under a percent.
    """
    rank = _checked_rank(matrix, rank)
    if min(matrix.shape) <= max(_SMALL, rank + _OVERSAMPLING):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    start = torch.randn((matrix.shape[1], rank + _OVERSAMPLING), generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]


def _checked_rank(matrix: Tensor, rank: int) -> int:
    if rank > min(matrix.shape):
        raise ValueError(
            f"rank is {rank}, but a layer of {matrix.shape[0]} x {matrix.shape[1]} has at most {min(matrix.shape)}: "
            "this init cannot start there"
        )
    return rank
