"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) of linear and convolution layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.initialise import INITS
from lora_diffusion.errors import UserError


class LoRA(Adapter):
    """delta = alpha / rank · up · down.

    A convolution's `lora_down` has its kernel, stride and padding, and its `lora_up` is 1x1, as in kohya files.
    The factors are float32 and are cast to the input's dtype for the product.
    """

    kind: ClassVar[str] = "lora"

    def __init__(
        self,
        base: Layer,
        rank: int,
        alpha: float,
        *,
        generator: torch.Generator | None = None,
        init: str = "default",
    ) -> None:
        """generator: on the CPU, draws the start; None is a fixed seed. init: a name in `INITS`.

        Raises ValueError for a rank below 1, an unknown init or a grouped convolution.
        """
        super().__init__(base)
        if rank < 1:
            raise ValueError(f"rank is {rank}; it must be 1 or more")
        if init not in INITS:
            raise ValueError(f"init is {init!r}; it must be one of {', '.join(INITS)}")
        self.rank = rank
        self.alpha = float(alpha)
        self.lora_down, self.lora_up = _empty_factors(base, rank)
        down, up = torch.empty(self.lora_down.weight.shape), torch.empty(self.lora_up.weight.shape)
        INITS[init](down, up, generator or torch.Generator().manual_seed(0))
        self._fill(down, up)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """x: what `base` takes. Exactly `base(x)` at strength 0, and equal to it while `lora_up` is 0."""
        output: Tensor = self.base(x)
        if self.strength == 0:
            return output
        return output + self.change(x, self.strength).to(output.dtype)

    def change(self, x: Tensor, strength: float | Tensor) -> Tensor:
        down, up = self.lora_down.weight.to(x.dtype), self.lora_up.weight.to(x.dtype)
        hidden = _apply(self.lora_down, x, down)  # (…, in) → (…, rank) or (B, in, H, W) → (B, rank, H', W')
        hidden = (hidden * (strength * self.scale)).to(x.dtype)  # scaled here, where it is smallest
        return _apply(self.lora_up, hidden, up)

    def delta(self) -> Tensor:
        product = self.lora_up.weight.flatten(1) @ self.lora_down.weight.flatten(1)  # (out, in · k · k)
        return (self.scale * product).reshape(self.base.weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "lora_down.weight": self.lora_down.weight.detach(),
            "lora_up.weight": self.lora_up.weight.detach(),
            "alpha": torch.tensor(self.alpha, dtype=torch.float32),
        }

    @classmethod
    def from_tensors(cls, base: Layer, tensors: Mapping[str, Tensor]) -> Self:
        """See `Adapter.from_tensors`. A missing alpha means scale 1, as in every reader of such files.

        The factors of a linear layer and of a 1x1 convolution may stand for one another.
        """
        unknown = tensors.keys() - {"lora_down.weight", "lora_up.weight", "alpha"}
        missing = {"lora_down.weight", "lora_up.weight"} - tensors.keys()
        if unknown or missing:
            found = ", ".join(sorted(tensors))
            raise UserError(f"not a LoRA: found {found}; expected lora_down.weight, lora_up.weight and alpha")
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        rank = down.shape[0] if down.ndim else 0
        if rank < 1:
            raise UserError(f"lora_down.weight has shape {tuple(down.shape)}: no rank")
        if "alpha" in tensors and tensors["alpha"].numel() != 1:
            raise UserError(f"alpha has shape {tuple(tensors['alpha'].shape)}; it must be one number")
        alpha = tensors["alpha"].item() if "alpha" in tensors else rank
        adapter = cls(base, rank, alpha)
        adapter._fill(
            _shaped("lora_down.weight", down, adapter.lora_down.weight.shape),
            _shaped("lora_up.weight", up, adapter.lora_up.weight.shape),
        )
        return adapter

    @torch.no_grad()
    def _fill(self, down: Tensor, up: Tensor) -> None:
        self.lora_down.weight.copy_(down)
        self.lora_up.weight.copy_(up)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


def _empty_factors(base: Layer, rank: int) -> tuple[Layer, Layer]:
    """(down, up) without values, float32 on the device of `base`.

    They are made on the meta device first: torch's own start would draw from the global generator.
    """
    down: Layer
    up: Layer
    if isinstance(base, nn.Linear):
        down = nn.Linear(base.in_features, rank, bias=False, device="meta", dtype=torch.float32)
        up = nn.Linear(rank, base.out_features, bias=False, device="meta", dtype=torch.float32)
    else:
        if base.groups != 1:
            raise ValueError(f"a LoRA cannot wrap a convolution with {base.groups} groups; leave the layer out")
        down = nn.Conv2d(
            base.in_channels,
            rank,
            _pair(base.kernel_size),
            stride=_pair(base.stride),
            padding=base.padding if isinstance(base.padding, str) else _pair(base.padding),
            dilation=_pair(base.dilation),
            bias=False,
            padding_mode=base.padding_mode,
            device="meta",
            dtype=torch.float32,
        )
        up = nn.Conv2d(rank, base.out_channels, 1, bias=False, device="meta", dtype=torch.float32)
    device = base.weight.device
    return down.to_empty(device=device), up.to_empty(device=device)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width


def _apply(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """`layer(x)` with `weight`, its own weight in another dtype."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight)
    return layer._conv_forward(x, weight, None)  # pyright: ignore[reportPrivateUsage]  # knows the padding mode


def _shaped(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """`tensor` in `shape`, where they differ by trailing ones at most."""
    if tensor.numel() != shape.numel() or tensor.shape[:2] != shape[:2]:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}; this layer needs {tuple(shape)}")
    return tensor.reshape(shape)
