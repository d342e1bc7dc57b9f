"""Weight-decomposed adaptation (Liu et al. 2024, arXiv:2402.09353): direction and magnitude are trained apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.frozen import full_weight
from lora_diffusion.adapters.geometry import DORA_SCALE, geometry_of, kind_of
from lora_diffusion.adapters.loha import LoHa
from lora_diffusion.adapters.lokr import LoKr
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.errors import UserError

DIRECTIONS: dict[str, type[Adapter]] = {"lora": LoRA, "loha": LoHa, "lokr": LoKr}
EPS = torch.finfo(torch.float32).eps  # as ComfyUI and Forge add to the norm


class DoRA(Adapter):
    """W + delta = m · (W + Δ) / ‖W + Δ‖, with Δ the change of an adapter inside (its alpha / rank included).

    A new one has a magnitude per INPUT channel, norms taken over outputs and kernel, `dora_scale` (1, in[, 1, 1]):
    the form that ComfyUI, Forge, A1111 and SD.Next compute as it was trained. The paper's form per output,
    (out, 1[, 1, 1]), is read too. The norm counts as a constant in the backward pass (the paper, section 4.3).
    """

    kind: ClassVar[str] = "dora"

    def __init__(
        self,
        base: Layer,
        rank: int,
        alpha: float,
        *,
        generator: torch.Generator | None = None,
        init: str = "default",
    ) -> None:
        """See `LoRA`, which is what is inside."""
        super().__init__(base)
        self.direction: Adapter = LoRA(base, rank, alpha, generator=generator, init=init)
        self.dora_scale = nn.Parameter(self._norm(axis=1))

    def delta(self) -> Tensor:
        weight = full_weight(self.base)
        return self._ratio() * (weight + self.direction.delta()) - weight

    def before_base(self, x: Tensor) -> Tensor:
        return x if self.strength != 1 or self.is_dropped() else self._scaled(x)

    def after_base(self, x: Tensor, output: Tensor) -> Tensor:
        if self.strength != 1 or self.is_dropped():
            return super().after_base(x, output)
        return self._changed(x, output)

    def change(self, x: Tensor, strength: float | Tensor) -> Tensor:
        scaled = self._scaled(x)
        return ((self._changed(scaled, self.base(scaled)) - self.base(x)) * strength).to(x.dtype)

    def _scaled(self, x: Tensor) -> Tensor:
        """The base's input where magnitudes are per input: scaling the weight's columns is scaling the inputs."""
        return (x * self._per_channel(self._ratio(), x)).to(x.dtype) if self._axis == 1 else x

    def _changed(self, scaled: Tensor, output: Tensor) -> Tensor:
        """`x` through W + delta and the bias, without ever keeping a tensor of the weight's size for backward.

        scaled: of `_scaled(x)`. output: what the base made of that.
        """
        self.direction.dropout, self.direction.dropout_seed = self.dropout, self.dropout_seed
        change = self.direction.change(scaled, 1.0)
        if self._axis == 1:
            return output + change.to(output.dtype)
        ratio = self._per_channel(self._ratio(), output)
        bias = self.base.bias
        if bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            shift = bias if isinstance(self.base, nn.Linear) else bias[:, None, None]
            return ((output - shift + change) * ratio + shift).to(output.dtype)
        return ((output + change) * ratio).to(output.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return self.direction.tensors() | {DORA_SCALE: self.dora_scale.detach()}

    def state(self) -> dict[str, Tensor]:
        return self.direction.state() | {DORA_SCALE: self.dora_scale.detach()}

    def trained(self) -> list[nn.Parameter]:
        return [*self.direction.trained(), self.dora_scale]

    def undecayed(self) -> list[nn.Parameter]:
        return [*self.direction.undecayed(), self.dora_scale]

    def delta_norm(self) -> Tensor:
        """Of the change inside, which is what a norm limit is about."""
        return self.direction.delta_norm()

    def scale_delta(self, factor: float) -> None:
        self.direction.scale_delta(factor)

    @classmethod
    def from_tensors(cls, base: Layer, tensors: Mapping[str, Tensor]) -> Self:
        """See `Adapter.from_tensors`. Inside may also be a LoHa or a LoKr, as LyCORIS writes them."""
        kind = kind_of(tensors)
        if kind is None or DORA_SCALE not in tensors:
            raise UserError(f"not a DoRA: found {', '.join(sorted(tensors))}; expected {DORA_SCALE} and an adapter")
        inside = {name: tensor for name, tensor in tensors.items() if name != DORA_SCALE}
        direction = DIRECTIONS[kind].from_tensors(base, inside)
        try:
            axis = geometry_of({name: tuple(tensor.shape) for name, tensor in tensors.items()}).dora_axis
        except ValueError as error:
            raise UserError(f"not a DoRA: {error}") from None
        shape = tuple(base.weight.shape)
        expected = [1] * len(shape)
        expected[axis or 0] = shape[axis or 0]
        if tensors[DORA_SCALE].numel() != shape[axis or 0]:
            raise UserError(f"{DORA_SCALE} has shape {tuple(tensors[DORA_SCALE].shape)}; it should be {expected}")
        adapter = cls.__new__(cls)
        Adapter.__init__(adapter, base)
        adapter.direction = direction
        scale = tensors[DORA_SCALE].to(base.weight.device, torch.float32).reshape(expected)
        adapter.dora_scale = nn.Parameter(scale.clone())
        return adapter

    @property
    def _axis(self) -> int:
        return 1 if self.dora_scale.shape[0] == 1 else 0

    def _ratio(self) -> Tensor:
        return self.dora_scale / self._norm(self._axis)

    @torch.no_grad()
    def _norm(self, axis: int) -> Tensor:
        """Of W + Δ over all axes but `axis`, which stays: (1, in[, 1, 1]) or (out, 1[, 1, 1])."""
        weight = full_weight(self.base) + self.direction.delta()
        others = [i for i in range(weight.ndim) if i != axis]
        return weight.square().sum(others, keepdim=True).sqrt() + EPS

    def _per_channel(self, ratio: Tensor, values: Tensor) -> Tensor:
        """The ratio in the shape that scales the channels of inputs or outputs, (…, C) or (B, C, H, W)."""
        return ratio.flatten().to(values.dtype) if isinstance(self.base, nn.Linear) else ratio.reshape(1, -1, 1, 1)
