"""LoRA factors in the dtype they are multiplied in, made for all layers at once.

Cast by every layer for itself, they would be four tiny kernels per layer and step, and their gradients two more; on a
fast GPU those take longer than the products.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.lora import LoRA


class WorkingCopies:
    """Inside `with`, the LoRAs of a base in half precision read copies of their factors, cast anew at its start.

    Gradients reach the copies, in their dtype; `gather` brings them to the parameters'. Each was rounded once by the
    product that made it, as it is where a layer casts for itself.
    """

    def __init__(self, root: nn.Module) -> None:
        """root: what has the LoRAs. Their parameters become parts of one tensor; they stay the same objects."""
        self._loras = [lora for lora in root.modules() if isinstance(lora, LoRA) and _can_copy(lora)]
        self.parameters: list[nn.Parameter] = [p for lora in self._loras for p in lora.trained()]
        """What there are copies of. Where these come first in the gradients' buffer, `gather` is one operation."""
        self._values: Tensor | None = None
        self._copies: list[Tensor] = []
        if not self._loras:
            return
        self._values = _one_tensor(self.parameters)
        self._halves = self._values.to(self._loras[0].base.weight.dtype)
        for part, parameter in zip(_parts(self._halves, self.parameters), self.parameters, strict=True):
            self._copies.append(part.view_as(parameter).requires_grad_())

    def __enter__(self) -> None:
        if self._values is None:
            return
        with torch.no_grad():
            self._halves.copy_(self._values)
        for copy in self._copies:
            copy.grad = None  # of a step that failed
        for lora, down, up in zip(self._loras, self._copies[::2], self._copies[1::2], strict=True):
            lora.copies = (down, up)

    def __exit__(self, *_: object) -> None:
        for lora in self._loras:
            lora.copies = None

    def gather(self, gradients: Tensor) -> None:
        """Add the copies' gradients to `gradients`, flat and in the order of `parameters`, and forget them."""
        if not self._copies:
            return
        with torch.no_grad():
            found = [torch.zeros_like(copy) if copy.grad is None else copy.grad for copy in self._copies]
            gradients[: sum(grad.numel() for grad in found)].add_(torch.cat([grad.flatten() for grad in found]))
        for copy in self._copies:
            copy.grad = None


def _can_copy(lora: LoRA) -> bool:
    """A start that is taken off again would be lost in the rounding, and float32 needs no copy."""
    return lora.start_down is None and lora.base.weight.dtype != torch.float32


def _one_tensor(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The values of all, flat, one after the other; the parameters become views of it."""
    values = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for part, parameter in zip(_parts(values, parameters), parameters, strict=True):
        parameter.data = part.view_as(parameter)
    return values


def _parts(flat: Tensor, parameters: Iterable[nn.Parameter]) -> tuple[Tensor, ...]:
    return flat.split([parameter.numel() for parameter in parameters])
