"""Several adapters on one layer, mixed per image of a batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, Layer


class StackWeights:
    """How much of each adapter each image gets. One object is shared by all stacks of a model."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.values: Tensor | None = None
        self.active: tuple[int, ...] = ()
        """Columns of `values` that are not 0 for every image."""

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
        self.names = tuple(names)
        self.values = values
        # Found out once here: a stack's forward must not wait for the device.
        self.active = tuple(j for j, used in enumerate((values != 0).any(0).cpu()) if used)

    def clear(self) -> None:
        """From now on every stack is its base layer."""
        self.names, self.values, self.active = (), None, ()


class AdapterStack(nn.Module):
    """One base layer, any number of adapters: image i sees W + Σ_j values[i, j] · delta_j.

    The input's batch is a multiple of the images in `weights`: all images, then all images again, as
    `torch.cat([unconditional, conditional])` orders them for classifier-free guidance.
    The adapters' own `strength` plays no part here.
    """

    def __init__(self, base: Layer, weights: StackWeights | None = None) -> None:
        """weights: shared with the model's other stacks. Freezes `base`."""
        super().__init__()
        self.base: Layer = base.requires_grad_(False)
        self.weights = weights or StackWeights()
        self._adapters = nn.ModuleList()  # not a ModuleDict: names may contain dots
        self._names: list[str] = []

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Adapters by name, in the order they were added."""
        return {name: self[name] for name in self._names}

    def __getitem__(self, name: str) -> Adapter:
        adapter = self._adapters[self._names.index(name)]
        assert isinstance(adapter, Adapter)
        return adapter

    def add(self, name: str, adapter: Adapter) -> None:
        """Raises ValueError if the name is taken or the adapter wraps another layer."""
        if name in self._names:
            raise ValueError(f"the stack has an adapter {name!r} already")
        if adapter.base is not self.base:
            raise ValueError(f"adapter {name!r} wraps another layer than this stack")
        self._names.append(name)
        self._adapters.append(adapter)

    def remove(self, name: str) -> None:
        """Raises ValueError if there is no such adapter."""
        index = self._names.index(name)
        del self._names[index]
        del self._adapters[index]

    def forward(self, x: Tensor) -> Tensor:
        """x: (k · images, …). Adapters that no image uses are skipped, so with none in use this is exactly the base."""
        output: Tensor = self.base(x)
        values = self.weights.values
        if values is None:
            return output
        for column in self.weights.active:
            name = self.weights.names[column]
            if name in self._names:
                strength = _per_row(values[:, column], x)
                output = output + self[name].change(x, strength).to(output.dtype)
        return output


def _per_row(column: Tensor, x: Tensor) -> Tensor:
    """(images,) → (k · images, 1, …), to broadcast against x."""
    passes, rest = divmod(x.shape[0], column.shape[0])
    if rest:
        raise ValueError(f"a batch of {x.shape[0]} is no multiple of the {column.shape[0]} images that have weights")
    return column.to(x.device).repeat(passes).reshape(-1, *(1,) * (x.ndim - 1))
