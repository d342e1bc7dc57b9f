"""The LoRA factors that the images of a batch use, side by side, so that a layer needs two batched products.

Image i uses adapters of the ranks r_1, r_2, …: its factors are joined along the rank, with strength and alpha / rank
folded in, and padded with zeros to the largest sum of ranks in the batch. An image without adapters has zeros only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Layer, apply_weight
from lora_diffusion.adapters.lora import LoRA

Mix = Sequence[tuple[LoRA, float]]
"""The adapters that an image uses, each with its strength."""


@dataclass(eq=False)
class Packed:
    """Factors for one layer. down: (images, R, in[, k, k]); up: (images, out, R); one image if all use the same mix."""

    base: Layer
    num_images: int
    down: Tensor
    up: Tensor
    _cast: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]
    )

    def change(self, x: Tensor) -> Tensor:
        """What the adapters add to the layer's output. x: (k · images, …), all images, then all images again."""
        passes = num_passes(x, self.num_images)
        is_shared = len(self.down) == 1
        down, up = self._factors(1 if is_shared else passes, x.dtype)
        if isinstance(self.base, nn.Linear):
            if is_shared:
                return nn.functional.linear(nn.functional.linear(x, down[0]), up[0])
            rows = x.reshape(len(x), -1, x.shape[-1])  # (rows, tokens, in)
            change = torch.bmm(torch.bmm(rows, down.transpose(1, 2)), up.transpose(1, 2))
            return change.reshape(*x.shape[:-1], -1)
        if is_shared:
            hidden = apply_weight(self.base, x, down[0])
            return nn.functional.conv2d(hidden, up[0][:, :, None, None])
        joined = x.reshape(1, -1, *x.shape[2:])  # (1, rows · in, H, W)
        hidden = nn.functional.conv2d(
            joined,
            down.flatten(0, 1),
            None,
            self.base.stride,
            self.base.padding,
            self.base.dilation,
            groups=len(x),
        )  # (1, rows · R, H', W')
        change = torch.bmm(up, hidden.reshape(len(x), down.shape[1], -1))  # (rows, out, H' · W')
        return change.reshape(len(x), -1, *hidden.shape[2:])

    def _factors(self, passes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = (passes, dtype)
        if key not in self._cast:
            self._cast[key] = (
                self.down.to(dtype).repeat(passes, *(1,) * (self.down.ndim - 1)),
                self.up.to(dtype).repeat(passes, 1, 1),
            )
        return self._cast[key]


@torch.no_grad()
def pack(base: Layer, mixes: Sequence[Mix]) -> Packed:
    """The factors for a batch, in float32. mixes: one per image; at least one is not empty."""
    is_shared = all(list(mix) == list(mixes[0]) for mix in mixes)
    made = [_join(mix) for mix in (mixes[:1] if is_shared else mixes)]
    rank = max(factors[0].shape[0] for factors in made if factors)
    first_down, first_up = next(factors for factors in made if factors)
    down = first_down.new_zeros(len(made), rank, *first_down.shape[1:])
    up = first_up.new_zeros(len(made), first_up.shape[0], rank)
    for image, factors in enumerate(made):
        if factors:
            down[image, : factors[0].shape[0]] = factors[0]
            up[image, :, : factors[0].shape[0]] = factors[1]
    return Packed(base, len(mixes), down, up)


def num_passes(x: Tensor, num_images: int) -> int:
    """How often all images come in the batch. Raises ValueError if not a whole number of times."""
    passes, rest = divmod(x.shape[0], num_images)
    if rest:
        raise ValueError(f"a batch of {x.shape[0]} is no multiple of the {num_images} images that have weights")
    return passes


def _join(mix: Mix) -> tuple[Tensor, Tensor] | None:
    """(R, in[, k, k]) and (out, R) of one image, strengths and scales in the second."""
    if not mix:
        return None
    factors = [(*adapter.factors(), adapter.scale * strength) for adapter, strength in mix]
    return (
        torch.cat([down for down, _, _ in factors]),
        torch.cat([up.flatten(1) * scale for _, up, scale in factors], dim=1),
    )
