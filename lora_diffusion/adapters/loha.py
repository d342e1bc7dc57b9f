"""Low-rank Hadamard product (Hyeon-Woo et al. 2022, FedPara, arXiv:2108.06098; LyCORIS, arXiv:2309.14859)."""

# Strict checking is of no use where torch lacks annotations.
# pyright: basic

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.fitting import alpha_of, check_fit, layer_shape, layer_size, trainable
from lora_diffusion.adapters.geometry import ALPHA, LOHA, LOHA_TUCKER


class LoHa(Adapter):
    """delta = alpha / rank · (w1_a · w1_b) ⊙ (w2_a · w2_b): rank up to rank², from as many numbers as 2 · rank.

    Names, shapes and start as in LyCORIS: (out, r) and (r, in · k · k). Files with Tucker cores, `hada_t1` and
    `hada_t2` (r, r, k, k), keep them: there w_a is (r, out) and w_b is (r, in).
    """

    kind: ClassVar[str] = "loha"
    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter
    hada_t1: nn.Parameter | None
    hada_t2: nn.Parameter | None

    def __init__(
        self,
        base: Layer,
        rank: int,
        alpha: float,
        *,
        generator: torch.Generator | None = None,
        init: str = "default",
    ) -> None:
        """generator: on the CPU, draws the start; None is a fixed seed. Raises ValueError for an init but "default"."""
        super().__init__(base)
        if rank < 1 or init != "default":
            raise ValueError(f"rank is {rank}, init is {init!r}; a LoHa needs a rank of 1 or more and init 'default'")
        self.rank = rank
        self.alpha = float(alpha)
        outputs, inputs = layer_size(base)
        generator = generator or torch.Generator().manual_seed(0)
        # LyCORIS: the first product starts small, the second at 0.
        factors = {
            "hada_w1_a": 0.1 * torch.randn((outputs, rank), generator=generator),
            "hada_w1_b": torch.randn((rank, inputs), generator=generator),
            "hada_w2_a": torch.zeros(outputs, rank),
            "hada_w2_b": torch.randn((rank, inputs), generator=generator),
        }
        self._take(factors)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        first = hadamard_half(self.hada_w1_a, self.hada_w1_b, self.hada_t1)
        second = hadamard_half(self.hada_w2_a, self.hada_w2_b, self.hada_t2)
        return (self.scale * first * second).reshape(layer_shape(self.base))

    def change(self, x: Tensor, strength: float | Tensor) -> Tensor:
        # The products are as large as the layer's weight: made again in backward instead of kept.
        return checkpoint(super().change, x, strength, use_reentrant=False, preserve_rng_state=False)

    def tensors(self) -> dict[str, Tensor]:
        return self.state() | {ALPHA: torch.tensor(self.alpha, dtype=torch.float32)}

    @torch.no_grad()
    def scale_delta(self, factor: float) -> None:
        for matrix in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b):
            matrix.mul_(factor**0.25)

    @classmethod
    def from_tensors(cls, base: Layer, tensors: Mapping[str, Tensor]) -> Self:
        geometry = check_fit(base, tensors, kind="loha")
        adapter = cls(base, geometry.rank, alpha_of(tensors, geometry.rank))
        adapter._take({name: tensor for name, tensor in tensors.items() if name != ALPHA})
        return adapter

    def _take(self, factors: Mapping[str, Tensor]) -> None:
        for name in LOHA + LOHA_TUCKER:
            self.register_parameter(name, trainable(factors[name], self.base) if name in factors else None)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


def hadamard_half(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """One of the two products, (out, in · k · k). With a Tucker core (r, r, k, k): a (r, out), b (r, in)."""
    if core is None:
        return a @ b
    return torch.einsum("ijkl,jc,io->ockl", core, b, a).flatten(1)
