"""Several adapters on one layer, mixed per image of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.adapters.packed import Packed, num_passes, pack


class StackWeights:
    """How much of each adapter each image gets. One object is shared by all stacks of a model."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.values: Tensor | None = None
        self.mixes: tuple[dict[str, float], ...] = ()
        """Per image, the adapters it uses and their strengths other than 0."""
        self.packed: dict[AdapterStack, Packed | None] = {}
        """What stacks have prepared for these values: made at a stack's first pass, dropped with the values."""

    def set(self, names: Sequence[str], values: Tensor) -> None:
        """From now on image i gets `values[i, j]` times the change of adapter `names[j]`.

        values: (images, adapters), any float dtype; best on the model's device. A stack that lacks an adapter of that
        name is unchanged by it; an adapter that is not named is not applied.
        Raises ValueError if the shapes differ or a name comes twice.
        """
        if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] != len(names):
            raise ValueError(f"values have shape {tuple(values.shape)}; expected (images, {len(names)})")
        if len(set(names)) != len(names):
            raise ValueError(f"an adapter is named twice: {', '.join(names)}")
        self.clear()
        self.names = tuple(names)
        self.values = values
        # Read once here: a stack's forward must not wait for the device.
        rows = cast("list[list[float]]", values.tolist())  # pyright: ignore[reportUnknownMemberType]
        self.mixes = tuple({name: value for name, value in zip(names, row, strict=True) if value != 0} for row in rows)

    def clear(self) -> None:
        """From now on every stack is its base layer."""
        self.names, self.values, self.mixes = (), None, ()
        self.packed.clear()


class AdapterStack(nn.Module):
    """One base layer, any number of adapters: image i sees W + Σ_j values[i, j] · delta_j.

    The input's batch is a multiple of the images in `weights`: all images, then all images again, as
    `torch.cat([unconditional, conditional])` orders them for classifier-free guidance.
    The adapters' own `strength` plays no part here. They are no submodules: hundreds may be loaded and one used, and
    walking over the model must not take longer for it.

    Without gradients, the LoRA adapters of all images are packed into two batched products (see `packed`); what one
    image costs depends on the ranks it uses, not on how many adapters there are. Other kinds, and all with gradients,
    are computed one by one on the images that use them.
    """

    def __init__(self, base: Layer, weights: StackWeights | None = None) -> None:
        """weights: shared with the model's other stacks. Freezes `base`."""
        super().__init__()
        self.base: Layer = base.requires_grad_(False)
        self.weights = weights or StackWeights()
        self._adapters: dict[str, Adapter] = {}

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Adapters by name, in the order they were added."""
        return dict(self._adapters)

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name]

    def __len__(self) -> int:
        return len(self._adapters)

    def add(self, name: str, adapter: Adapter) -> None:
        """Raises ValueError if the name is taken or the adapter wraps another layer."""
        if name in self._adapters:
            raise ValueError(f"the stack has an adapter {name!r} already")
        if adapter.base is not self.base:
            raise ValueError(f"adapter {name!r} wraps another layer than this stack")
        self._adapters[name] = adapter
        self.weights.packed.pop(self, None)

    def remove(self, name: str) -> None:
        """Raises ValueError if there is no such adapter."""
        if name not in self._adapters:
            raise ValueError(f"the stack has no adapter {name!r}")
        del self._adapters[name]
        self.weights.packed.pop(self, None)

    def forward(self, x: Tensor) -> Tensor:
        """x: (k · images, …). Adapters that no image uses are skipped, so with none in use this is exactly the base."""
        output: Tensor = self.base(x)
        if not self.weights.mixes:
            return output
        if torch.is_grad_enabled():
            return self._add_singly(output, x, self._used(packable=True) + self._used(packable=False))
        if self not in self.weights.packed:
            self.weights.packed[self] = self._pack()
        packed = self.weights.packed[self]
        if packed is not None:
            output = output + packed.change(x).to(output.dtype)
        return self._add_singly(output, x, self._used(packable=False))

    def _pack(self) -> Packed | None:
        mixes = [
            [(adapter, value) for name, value in mix.items() if _is_packable(adapter := self._adapters.get(name))]
            for mix in self.weights.mixes
        ]
        return pack(self.base, mixes) if any(mixes) else None

    def _used(self, *, packable: bool) -> list[str]:
        named = dict.fromkeys(name for mix in self.weights.mixes for name in mix if name in self._adapters)
        return [name for name in named if _is_packable(self._adapters[name]) == packable]

    def _add_singly(self, output: Tensor, x: Tensor, names: Sequence[str]) -> Tensor:
        """`output` and the changes of these adapters, each computed on the rows of the images that use it."""
        if not names:
            return output
        passes = num_passes(x, len(self.weights.mixes))
        for name in names:
            strengths = [mix.get(name, 0.0) for mix in self.weights.mixes] * passes
            rows = [row for row, strength in enumerate(strengths) if strength != 0]
            strength = x.new_tensor([strengths[row] for row in rows], dtype=torch.float32)
            strength = strength.reshape(-1, *(1,) * (x.ndim - 1))
            if len(rows) == len(x):
                output = output + self._adapters[name].change(x, strength).to(output.dtype)
            else:
                chosen = torch.tensor(rows, device=x.device)
                change = self._adapters[name].change(x[chosen], strength)
                output = output.index_add(0, chosen, change.to(output.dtype))
        return output


def _is_packable(adapter: Adapter | None) -> TypeGuard[LoRA]:
    """Whether two matrix products of plain factors are all there is to it."""
    return (
        type(adapter) is LoRA
        and adapter.dropout_seed is None
        and getattr(adapter.base, "padding_mode", "zeros") == "zeros"
    )
