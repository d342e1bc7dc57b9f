"""Low-rank Kronecker product (Edalati et al. 2022, KronA, arXiv:2212.10650; LyCORIS, arXiv:2309.14859)."""

# Strict checking is of no use where torch lacks annotations.
# pyright: basic

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.fitting import alpha_of, check_fit, trainable
from lora_diffusion.adapters.geometry import ALPHA, LOKR


class LoKr(Adapter):
    """delta = scale · w1 ⊗ w2, with w1 (a, b) small and w2 (out/a, in/b[, k, k]) whole or of rank `rank`.

    Names, shapes and start as in LyCORIS. w2 is factored into `lokr_w2_a` (out/a, r) and `lokr_w2_b` (r, in/b · k · k)
    where the rank is below half of its larger side. scale: alpha / rank, but 1 where nothing is factored: every reader
    ignores alpha there.
    """

    kind: ClassVar[str] = "lokr"
    lokr_w1: nn.Parameter | None
    lokr_w1_a: nn.Parameter | None
    lokr_w1_b: nn.Parameter | None
    lokr_w2: nn.Parameter | None
    lokr_w2_a: nn.Parameter | None
    lokr_w2_b: nn.Parameter | None
    lokr_t2: nn.Parameter | None

    def __init__(
        self,
        base: Layer,
        rank: int,
        alpha: float,
        *,
        generator: torch.Generator | None = None,
        init: str = "default",
        factor: int = -1,
    ) -> None:
        """factor: size of a and b, see `split`; -1 is as near to the square root as the layer allows.

        generator: on the CPU, draws the start; None is a fixed seed. Raises ValueError for an init but "default".
        """
        super().__init__(base)
        if rank < 1 or init != "default":
            raise ValueError(f"rank is {rank}, init is {init!r}; a LoKr needs a rank of 1 or more and init 'default'")
        self.rank = rank
        self.alpha = float(alpha)
        shape = tuple(base.weight.shape)
        (a, outputs), (b, inputs) = split(shape[0], factor), split(shape[1], factor)
        generator = generator or torch.Generator().manual_seed(0)
        factors = {"lokr_w1": torch.empty(a, b)}
        nn.init.kaiming_uniform_(factors["lokr_w1"], a=math.sqrt(5), generator=generator)
        if rank < max(outputs, inputs) / 2:
            factors["lokr_w2_a"] = torch.empty(outputs, rank)
            nn.init.kaiming_uniform_(factors["lokr_w2_a"], a=math.sqrt(5), generator=generator)
            factors["lokr_w2_b"] = torch.zeros(rank, inputs * math.prod(shape[2:]))
        else:
            factors["lokr_w2"] = torch.zeros(outputs, inputs, *shape[2:])
        self._take(factors)

    @property
    def scale(self) -> float:
        is_factored = self.lokr_w1_b is not None or self.lokr_w2_b is not None
        return self.alpha / self.rank if is_factored else 1.0

    def delta(self) -> Tensor:
        w1, w2 = self._sides()
        a, b = w1.shape
        # kron over the first two axes: row (i, p), column (j, q) holds w1[i, j] · w2[p, q]
        product = torch.einsum("ab,pq...->apbq...", w1, w2)
        return (self.scale * product).reshape(a * w2.shape[0], b * w2.shape[1], *w2.shape[2:])

    def change(self, x: Tensor, strength: float | Tensor) -> Tensor:
        """Without forming the product: w2 acts on each of the b groups of channels, w1 then mixes the groups."""
        w1, w2 = self._sides()
        w1, w2 = (w1 * self.scale).to(x.dtype), w2.to(x.dtype)
        if isinstance(self.base, nn.Linear):
            groups = nn.functional.linear(x.unflatten(-1, (w1.shape[1], -1)), w2)  # (…, b, in/b) → (…, b, out/a)
            mixed = torch.einsum("ab,...bp->...ap", w1, groups).flatten(-2)
        else:
            split_up = x.unflatten(1, (w1.shape[1], -1)).flatten(0, 1)  # (B · b, in/b, H, W)
            groups = self.base._conv_forward(split_up, w2, None)  # pyright: ignore[reportPrivateUsage]
            groups = groups.unflatten(0, (-1, w1.shape[1]))  # (B, b, out/a, H', W')
            mixed = torch.einsum("ab,nbphw->naphw", w1, groups).flatten(1, 2)
        return (mixed * strength).to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return self.state() | {ALPHA: torch.tensor(self.alpha, dtype=torch.float32)}

    def delta_norm(self) -> Tensor:
        w1, w2 = self._sides()
        return self.scale * w1.norm() * w2.norm()  # of a Kronecker product: the product of the norms

    @torch.no_grad()
    def scale_delta(self, factor: float) -> None:
        state = self.state()
        for side in ("lokr_w1", "lokr_w2"):
            names = [name for name in (side, f"{side}_a", f"{side}_b") if name in state]
            for name in names:
                state[name].mul_(factor ** (0.5 / len(names)))

    @classmethod
    def from_tensors(cls, base: Layer, tensors: Mapping[str, Tensor]) -> Self:
        """See `Adapter.from_tensors`. Either side may be whole or factored, w2 also around a Tucker core."""
        geometry = check_fit(base, tensors, kind="lokr")
        adapter = cls.__new__(cls)
        Adapter.__init__(adapter, base)
        adapter.rank = max(geometry.rank, 1)
        adapter.alpha = alpha_of(tensors, adapter.rank)
        adapter._take({name: tensor for name, tensor in tensors.items() if name != ALPHA})
        return adapter

    def _sides(self) -> tuple[Tensor, Tensor]:
        """w1 (a, b) and w2 (out/a, in/b[, k, k]), factors multiplied out."""
        w1 = _multiplied(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b)
        if self.lokr_t2 is not None and self.lokr_w2_a is not None and self.lokr_w2_b is not None:
            w2 = torch.einsum("ijkl,jq,ip->pqkl", self.lokr_t2, self.lokr_w2_b, self.lokr_w2_a)
        else:
            w2 = _multiplied(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b)
        return w1.flatten(1), w2.reshape(w2.shape[0], -1, *self.base.weight.shape[2:])

    def _take(self, factors: Mapping[str, Tensor]) -> None:
        for name in LOKR:
            self.register_parameter(name, trainable(factors[name], self.base) if name in factors else None)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


def _multiplied(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    if whole is not None:
        return whole
    assert a is not None and b is not None, "a side is whole or has two factors"
    return a @ b


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """`size` as a product (small, large), where either is `factor` if that divides `size`.

    Otherwise small is the largest divisor up to the root, and up to the factor if one is given. As LyCORIS splits:
    320 → (16, 20), or (8, 40) with factor 8, or (10, 32) with factor 12.
    """
    if factor > 0 and size % factor == 0:
        small = factor
    else:
        limit = math.isqrt(size) if factor < 1 else min(factor, math.isqrt(size))
        small = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return min(small, size // small), max(small, size // small)
