"""Clipping and the optimiser's step without asking the device for a number, so that neither waits for the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_NORM_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_, whose results these are


class QuietUpdate:
    """Applies gradients as `clip_grad_norm_` and `optimizer.step()` do, but never looks at a value.

    A loss or a norm that is not finite sets `broken`, on the device, and from then on nothing is changed any more:
    whoever reads it later finds the weights, moments and step counts of the last good step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
        """optimizer: `fused` AdamW over `parameters`, all on one device. max_norm: 0 only measures.

        Gradients become views of one buffer per device and dtype, so that zeroing and scaling them is one operation.
        """
        if not all(group.get("fused") for group in optimizer.param_groups):
            raise ValueError("the optimiser must be fused: only such a one can be told on the device to do nothing")
        self.optimizer = optimizer
        self._max_norm = max_norm or math.inf
        self.gradients = _one_buffer(parameters)
        """Those of all parameters, flat, one after the other."""
        device = self.gradients.device
        self.broken = torch.zeros((), device=device)
        """1.0 since the first loss or norm that was not finite."""
        # An attribute that fused optimisers look for (GradScaler sets it): where it is 1, they change nothing.
        optimizer.found_inf = self.broken  # pyright: ignore[reportAttributeAccessIssue]

    def zero_gradients(self) -> None:
        """Zero, not None: their addresses stay."""
        self.gradients.zero_()

    @torch.no_grad()
    def apply(self, loss: Tensor) -> Tensor:
        """One optimiser step; returns the norm of all gradients before clipping. loss, norm: 0-d, float32."""
        norm = torch.linalg.vector_norm(self.gradients)
        is_bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        self.broken.copy_(torch.maximum(self.broken, is_bad.to(self.broken.dtype)))
        self.gradients.mul_((self._max_norm / (norm + _NORM_EPS)).clamp(max=1.0))
        self.optimizer.step()
        return norm


def _one_buffer(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Gives each parameter a zero gradient in one flat tensor, and returns that."""
    kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
    if len(kinds) != 1:
        raise ValueError(f"the parameters are on different devices or of different types: {kinds}")
    (device, dtype), *_ = kinds
    buffer = torch.zeros(sum(parameter.numel() for parameter in parameters), device=device, dtype=dtype)
    start = 0
    for parameter in parameters:
        parameter.grad = buffer[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return buffer
