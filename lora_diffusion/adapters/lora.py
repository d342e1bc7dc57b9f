"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) of linear and convolution layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer, apply_weight
from lora_diffusion.adapters.fitting import alpha_of, check_fit
from lora_diffusion.adapters.frozen import full_weight
from lora_diffusion.adapters.fused import can_fuse, lora_linear
from lora_diffusion.adapters.geometry import ALPHA, DOWN, MID, UP, Geometry
from lora_diffusion.adapters.initialise import INITS

if TYPE_CHECKING:
    from lora_diffusion.adapters.together import Together


class LoRA(Adapter):
    """delta = alpha / rank · (up · down - what they started as).

    A convolution's `lora_down` has its kernel, stride and padding, and its `lora_up` is 1x1, as in kohya files.
    The factors are float32 and are cast to the input's dtype for the product. Most starts have no effect, as `up` is
    0; PiSSA and OLoRA start from parts of the frozen weight, which `start_down` and `start_up` take off again: the
    frozen weight itself is never changed, and the file is a plain LoRA for it, of twice the rank.
    """

    kind: ClassVar[str] = "lora"
    start_down: Tensor | None
    start_up: Tensor | None
    copies: tuple[Tensor, Tensor] | None = None
    """(down, up) that passes read in place of the parameters, in the dtype of the base; see `WorkingCopies`."""
    together: Together | None = None
    """What computes this layer and others with the same input, for whoever calls them all."""

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

        Raises ValueError for a rank below 1 or above what the init can start, an unknown init or a grouped convolution.
        """
        super().__init__(base)
        if rank < 1:
            raise ValueError(f"rank is {rank}; it must be 1 or more")
        if init not in INITS:
            raise ValueError(f"init is {init!r}; it must be one of {', '.join(INITS)}")
        self.rank = rank
        self.alpha = float(alpha)
        self.lora_down, self.lora_up = _empty_factors(base, rank)
        start, generator = INITS[init], generator or torch.Generator().manual_seed(0)
        device = base.weight.device if start.needs_weight else "cpu"
        down = torch.empty(self.lora_down.weight.shape, device=device)
        up = torch.empty(self.lora_up.weight.shape, device=device)
        start.fill(down, up, full_weight(base) if start.needs_weight else down, self.scale, generator)
        self._fill(down, up)
        self.register_buffer("start_down", self.lora_down.weight.detach().clone() if start.needs_weight else None)
        self.register_buffer("start_up", self.lora_up.weight.detach().clone() if start.needs_weight else None)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """(down, up) whose product times `scale` is the delta: (r, in, …), (out, r, …), r the rank or twice the rank.

        up · down - up₀ · down₀ is written as up · (down - down₀) + (up - up₀) · down₀: no large numbers that cancel.
        """
        down, up = self.copies or (self.lora_down.weight, self.lora_up.weight)
        if self.start_down is None or self.start_up is None:
            return down, up
        return torch.cat([down - self.start_down, self.start_down]), torch.cat([up, up - self.start_up], dim=1)

    def is_fused(self, x: Tensor) -> bool:
        """Whether layer and adapter are computed as one step of autograd."""
        drops_parts = self.dropout_seed is not None and (self.dropout.element > 0 or self.dropout.rank > 0)
        return self.strength != 0 and not drops_parts and not self.is_dropped() and can_fuse(x, self.base)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_fused(x):
            return super().forward(x)
        return lora_linear(x, self.base, *self.factors(), self.strength * self.scale)

    def change(self, x: Tensor, strength: float | Tensor) -> Tensor:
        down, up = (factor.to(x.dtype) for factor in self.factors())
        hidden = apply_weight(self.lora_down, x, down)  # (…, in) → (…, r) or (B, in, H, W) → (B, r, H', W')
        if self.dropout_seed is not None:
            hidden = hidden * self._kept(hidden, self.dropout_seed)
        hidden = (hidden * (strength * self.scale)).to(x.dtype)  # scaled here, where it is smallest
        return apply_weight(self.lora_up, hidden, up)

    def delta(self) -> Tensor:
        down, up = self.factors()
        return (self.scale * (up.flatten(1) @ down.flatten(1))).reshape(self.base.weight.shape)

    def undecayed(self) -> list[nn.Parameter]:
        return [] if self.start_down is None else self.trained()

    def delta_norm(self) -> Tensor:
        down, up = (factor.flatten(1) for factor in self.factors())
        # ‖U D‖² = tr(UᵀU · DDᵀ), of size rank x rank
        return self.scale * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()

    @torch.no_grad()
    def scale_delta(self, factor: float) -> None:
        if self.start_down is not None:
            raise ValueError("a change that starts from parts of the weight cannot be scaled through its factors")
        self.lora_down.weight.mul_(factor**0.5)
        self.lora_up.weight.mul_(factor**0.5)

    def tensors(self) -> dict[str, Tensor]:
        down, up = self.factors()
        alpha = self.scale * down.shape[0]  # readers take the rank from the factors
        return {DOWN: down.detach(), UP: up.detach(), ALPHA: torch.tensor(alpha, dtype=torch.float32)}

    @classmethod
    def from_tensors(cls, base: Layer, tensors: Mapping[str, Tensor]) -> Self:
        """See `Adapter.from_tensors`. A missing alpha means scale 1, as in every reader of such files.

        The factors of a linear layer and of a 1x1 convolution may stand for one another. A Tucker core (LoCon's
        `lora_mid`) becomes part of `lora_down`, which is the same change at the same rank.
        """
        geometry: Geometry = check_fit(base, tensors, kind="lora")
        adapter = cls.__new__(cls)  # without a start, which would be drawn to be overwritten
        Adapter.__init__(adapter, base)
        adapter.rank = geometry.rank
        adapter.alpha = float(alpha_of(tensors, geometry.rank))
        adapter.lora_down, adapter.lora_up = _empty_factors(base, geometry.rank)
        adapter.register_buffer("start_down", None)
        adapter.register_buffer("start_up", None)
        adapter._fill(whole_down(tensors), tensors[UP])
        return adapter

    @torch.no_grad()
    def _fill(self, down: Tensor, up: Tensor) -> None:
        self.lora_down.weight.copy_(down.reshape(self.lora_down.weight.shape))
        self.lora_up.weight.copy_(up.reshape(self.lora_up.weight.shape))

    def _kept(self, hidden: Tensor, seed: int) -> Tensor:
        """What dropout multiplies the hidden values with: 0, or as much as makes up for the zeros."""
        generator = torch.Generator(hidden.device).manual_seed(seed)
        axis = hidden.ndim - 1 if isinstance(self.base, nn.Linear) else 1
        # Both halves of a PiSSA change belong to the same component of the rank.
        shape = [self.rank if i == axis else size for i, size in enumerate(hidden.shape)]
        kept = torch.ones((), dtype=hidden.dtype, device=hidden.device)
        for chance, sizes in (
            (self.dropout.rank, [size if i in (0, axis) else 1 for i, size in enumerate(shape)]),
            (self.dropout.element, shape),
        ):
            if chance:
                drawn = torch.rand(sizes, generator=generator, device=hidden.device) >= chance
                kept = kept * (drawn / (1 - chance)).to(hidden.dtype)
        if kept.ndim and hidden.shape[axis] != self.rank:
            kept = torch.cat([kept, kept], dim=axis)
        return kept

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


def whole_down(tensors: Mapping[str, Tensor]) -> Tensor:
    """`lora_down` with the kernel in it: (r, in, k, k) where a Tucker core (r, r, k, k) held it, else as it is."""
    if MID not in tensors:
        return tensors[DOWN]
    wide = torch.promote_types(tensors[DOWN].dtype, torch.float32)
    return torch.einsum("abkl,bi->aikl", tensors[MID].to(wide), tensors[DOWN].flatten(1).to(wide))


class _Linear(nn.Linear):
    """Without a start: torch's own would draw from the global generator, and take most of the time of loading."""

    def reset_parameters(self) -> None:
        pass


class _Conv2d(nn.Conv2d):
    """See `_Linear`."""

    def reset_parameters(self) -> None:
        pass


def _empty_factors(base: Layer, rank: int) -> tuple[Layer, Layer]:
    """(down, up) without values, float32 on the device of `base`."""
    device = base.weight.device
    if isinstance(base, nn.Linear):
        return (
            _Linear(base.in_features, rank, bias=False, device=device, dtype=torch.float32),
            _Linear(rank, base.out_features, bias=False, device=device, dtype=torch.float32),
        )
    if base.groups != 1:
        raise ValueError(f"a LoRA cannot wrap a convolution with {base.groups} groups; leave the layer out")
    down = _Conv2d(
        base.in_channels,
        rank,
        _pair(base.kernel_size),
        stride=_pair(base.stride),
        padding=base.padding if isinstance(base.padding, str) else _pair(base.padding),
        dilation=_pair(base.dilation),
        bias=False,
        padding_mode=base.padding_mode,
        device=device,
        dtype=torch.float32,
    )
    return down, _Conv2d(rank, base.out_channels, 1, bias=False, device=device, dtype=torch.float32)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width
