"""LoRA factors in the dtype they are multiplied in, made for all layers at once.

Cast by every layer for itself, they would be four tiny kernels per layer and step, and their gradients two more; on a
fast GPU those take longer than the products. Layers with the same input are computed together, for the same reason, and
on a CPU because what they share is read once: q, k and v of 1024 x 320 take two thirds of their time, both ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.adapters.together import Together, can_go_together
from lora_diffusion.models.attention import projections_with_one_input


class WorkingCopies:
    """Inside `with`, the LoRAs of a base in half precision read copies of their factors, cast anew at its start.

    Gradients reach the copies, in their dtype; `gather` brings them to the parameters'. Each was rounded once by the
    product that made it, as it is where a layer casts for itself.
    """

    def __init__(self, root: nn.Module, adapters: Iterable[nn.Module] = ()) -> None:
        """root: what has the LoRAs. Their parameters become parts of one tensor; they stay the same objects.

        adapters: further ones, of `JointAdapters` in `root`, whose modules they are not.
        """
        modules = chain(root.modules(), *(adapter.modules() for adapter in adapters))
        loras = {id(lora): lora for lora in modules if isinstance(lora, LoRA) and _can_copy(lora)}
        groups = [[loras.get(id(layer)) for layer in group] for group in projections_with_one_input(root)]
        self._groups = [Together(group) for group in groups if can_go_together(group)]
        grouped = {id(lora) for group in self._groups for lora in group.loras}
        self._single = [lora for key, lora in loras.items() if key not in grouped]
        self.parameters: list[nn.Parameter] = []
        """What there are copies of. Where these come first in the gradients' buffer, `gather` is one operation."""
        self._copies: list[Tensor] = []
        for group in self._groups:
            downs, ups = zip(*(lora.trained() for lora in group.loras), strict=True)
            self.parameters += [*downs, *ups]
            self._copies += [group.down, group.up]
        for lora in self._single:
            self.parameters += lora.trained()
            self._copies += [torch.empty_like(p, dtype=lora.base.weight.dtype).requires_grad_() for p in lora.trained()]
        if self._copies:
            values = _one_tensor(self.parameters)
            self._values = list(values.split([copy.numel() for copy in self._copies]))
            self._targets = [copy.detach().view(-1) for copy in self._copies]

    def __enter__(self) -> None:
        if not self._copies:
            return
        with torch.no_grad():
            torch._foreach_copy_(self._targets, self._values)  # pyright: ignore[reportPrivateImportUsage]
        for copy in self._copies:
            copy.grad = None  # of a step that failed
        copies = self._copies[2 * len(self._groups) :]
        for lora, down, up in zip(self._single, copies[::2], copies[1::2], strict=True):
            lora.copies = (down, up)
        for group in self._groups:
            for lora in group.loras:
                lora.together = group

    def __exit__(self, *_: object) -> None:
        for lora in self._single:
            lora.copies = None
        for group in self._groups:
            for lora in group.loras:
                lora.together = None

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
