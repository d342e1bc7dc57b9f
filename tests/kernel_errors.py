"""How far the Triton kernels are from the same in float64. Run by itself with TRITON_INTERPRET=1, where they run on a
CPU, it prints a line of JSON: the name of each case, and the errors of its output and of its input's gradient.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Errors = tuple[float, float]
"""Of the output and of the input's gradient: the norm of the difference over the norm of what is right."""


@dataclass(frozen=True)
class Norm:
    """A group norm to be tried: shape is (B, C, H, W)."""

    shape: tuple[int, int, int, int]
    groups: int
    silu: bool = True
    mean: float = 1.0
    spread: float = 2.0


NORMS = {
    "several images": Norm((2, 64, 8, 8), 32),
    "groups across blocks of channels": Norm((1, 320, 16, 16), 32),
    "pixels that do not fill the last chunk": Norm((1, 960, 8, 9), 32, silu=False),
    "odd sides": Norm((2, 128, 33, 17), 8),
    "more than 4096 pixels, so that chunks have several tiles": Norm((1, 6, 65, 65), 3),
    "one group of many chunks": Norm((1, 128, 24, 24), 1, silu=False),
    "one pixel": Norm((2, 48, 1, 1), 3),
    "a mean 500 times the spread": Norm((2, 64, 8, 8), 32, mean=50.0, spread=0.1),
}
GEGLUS = {"one block of columns": (3, 7, 48), "blocks of columns, odd width": (2, 5, 2 * 601), "one row": (1, 2 * 256)}


def norm_errors(norm: Norm, dtype: torch.dtype, device: str) -> Errors:
    from lora_diffusion.models.gpu_kernels import group_norm

    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(norm.shape, generator=generator) * norm.spread + norm.mean).to(device, dtype).requires_grad_()
    weight, bias = torch.randn((2, norm.shape[1]), generator=generator).to(device, dtype)
    direction = torch.randn(norm.shape, generator=generator).to(device, dtype)
    made = group_norm(x, weight, bias, norm.groups, 1e-5, silu=norm.silu)

    exact_x = x.detach().double().requires_grad_()
    exact = nn.functional.group_norm(exact_x, norm.groups, weight.double(), bias.double(), 1e-5)
    errors = _errors(x, made, exact_x, nn.functional.silu(exact) if norm.silu else exact, direction)
    assert made.is_contiguous(memory_format=torch.channels_last)
    return errors


def geglu_errors(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Errors:
    from lora_diffusion.models.gpu_kernels import geglu

    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()
    made = geglu(x)
    direction = torch.randn(made.shape, generator=generator).to(device, dtype)

    exact_x = x.detach().double().requires_grad_()
    factor, gate = exact_x.chunk(2, dim=-1)
    return _errors(x, made, exact_x, factor * nn.functional.gelu(gate), direction)


def _errors(x: Tensor, made: Tensor, exact_x: Tensor, exact: Tensor, direction: Tensor) -> Errors:
    (gradient,) = torch.autograd.grad(made, x, direction)
    (exact_gradient,) = torch.autograd.grad(exact, exact_x, direction.double())
    assert made.dtype == gradient.dtype == x.dtype
    assert gradient.shape == x.shape
    return _distance(made.detach(), exact.detach()), _distance(gradient, exact_gradient)


def _distance(made: Tensor, exact: Tensor) -> float:
    return float((made.double() - exact).norm() / exact.norm())


if __name__ == "__main__":
    errors = {name: norm_errors(norm, torch.float32, "cpu") for name, norm in NORMS.items()}
    errors |= {name: geglu_errors(shape, torch.float32, "cpu") for name, shape in GEGLUS.items()}
    print(json.dumps(errors))
