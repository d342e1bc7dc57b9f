"""Frozen linear layers whose weight is kept in 4 or 8 bits, as the base of QLoRA (Dettmers et al. 2023,
arXiv:2305.14314): what is multiplied with is the weight unpacked again, in the dtype of the base.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_diffusion.errors import UserError

QuantiseKind = Literal["none", "nf4", "int8"]


def quantise_linears(root: nn.Module, kind: QuantiseKind, device: torch.device | str) -> None:
    """Put a `QuantisedLinear` on `device` in the place of every Linear below `root`; convolutions stay as they are.

    One layer at a time: `device` never holds a second copy of more than one weight. Those that embed the timestep are
    no exception: on the base that ships, in NF4, they change a prediction by 0.2 %, and all layers together by 3 %.
    """
    if kind == "none":
        return
    paths = [path for path, module in root.named_modules() if isinstance(module, nn.Linear)]
    for path in paths:
        root.set_submodule(path, QuantisedLinear(root.get_submodule(path), kind, device))


def check_quantise(kind: QuantiseKind) -> None:
    """Raises UserError if what `kind` needs is not installed."""
    if kind == "nf4":
        _bitsandbytes()


class QuantisedLinear(nn.Linear):
    """A frozen Linear that unpacks its weight whenever it needs it, in the backward pass again.

    Its parameters are the packed weight's and the bias. It must not be cast to another dtype after it was made.
    """

    bias: nn.Parameter | None  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, layer: nn.Module, kind: Literal["nf4", "int8"], device: torch.device | str) -> None:
        """layer: a Linear in the dtype to compute in, on any device; it is left as it is."""
        assert isinstance(layer, nn.Linear)
        nn.Module.__init__(self)  # not Linear's, which would make a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.dtype = kind, layer.weight.dtype
        self.packed = PACKINGS[kind](layer.weight.detach().to(device))
        bias = layer.bias
        self.bias = None if bias is None else _frozen(bias.detach().to(device))  # pyright: ignore[reportUnnecessaryComparison]
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A stand-in with the shape, dtype and device of the real weight and no memory. Its values are NaN, so that
        arithmetic meant for `dequantised_weight` does not go unnoticed.
        """
        nan = torch.full((), torch.nan, dtype=self.dtype, device=self.packed.values.device)
        return nan.expand(self.out_features, self.in_features)

    def dequantised_weight(self) -> Tensor:
        """The weight (out, in) that this layer multiplies with, in the base's dtype. Unpacked anew at each call."""
        return self.packed.unpack(self.dtype).view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenLinear.apply(input, self)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class _FrozenLinear(torch.autograd.Function):
    """F.linear with a weight that is not kept between the passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantised_weight(), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_output @ ctx.layer.dequantised_weight(), None  # (…, out) @ (out, in)


class NF4Weight(nn.Module):
    """4 bits per value: the nearest of the 16 NormalFloat levels times the block's scale; about 4.13 bits in all.

    The scales are themselves quantised to 8 bits around their mean ("double quantisation").
    """

    BLOCK = 64  # values per scale; the QLoRA paper's choice
    GROUP = 256  # scales per scale of scales; bitsandbytes' choice

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.num_values = weight.numel()
        # One block per row: where rows are no multiple of a block, such as 96 values, bitsandbytes 0.50 unpacks with
        # misplaced scales on CPUs with AVX-512.
        blocks = nn.functional.pad(weight.flatten(), (0, -self.num_values % self.BLOCK)).view(-1, self.BLOCK)
        packed, state = _bitsandbytes().quantize_4bit(
            blocks, blocksize=self.BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.values = _frozen(packed)  # (num_values / 2, 1), uint8
        self.scales = _frozen(state.absmax)  # (num_values / 64,), uint8: places in scale_code
        self.scale_code = _frozen(state.state2.code)  # (256,)
        self.scale_of_scales = _frozen(state.state2.absmax)  # (num_values / 64 / 256,)
        self.scale_mean = _frozen(state.offset)  # ()

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The values in order, (num_values,)."""
        assert self.scale_of_scales.dtype == torch.float32, "a quantised layer was cast to another dtype"
        operators = torch.ops.bitsandbytes  # the ones below bitsandbytes.functional, which torch.compile sees through
        scales = operators.dequantize_blockwise(
            self.scales, self.scale_of_scales, self.scale_code, self.GROUP, torch.float32
        )
        shape = (len(scales), self.BLOCK)
        blocks = operators.dequantize_4bit(self.values, scales + self.scale_mean, self.BLOCK, "nf4", shape, dtype)
        return blocks.flatten()[: self.num_values]


class Int8Weight(nn.Module):
    """8 bits per value: a whole number in [-127, 127] times the row's scale, the largest of the row / 127.

    Plain torch: bitsandbytes' own rounding takes only float16 on a GPU, and its product rounds the input too.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        wide = weight.float()
        scales = wide.abs().amax(dim=1, keepdim=True) / 127
        self.values = _frozen((wide / scales.clamp_min(1e-38)).round().to(torch.int8))  # (out, in)
        self.scales = _frozen(scales)  # (out, 1), float32

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight, (out, in)."""
        assert self.scales.dtype == torch.float32, "a quantised layer was cast to another dtype"
        # 16 bits hold the whole numbers exactly, and torch multiplies in the scales' float32: rounded once.
        return self.values.to(dtype).mul_(self.scales)


PACKINGS: dict[str, type[NF4Weight] | type[Int8Weight]] = {"nf4": NF4Weight, "int8": Int8Weight}
"""What `model.quantise` names."""


def _frozen(tensor: Tensor) -> nn.Parameter:
    # Parameters, not buffers: they count as the base's memory, and processes do not broadcast them at every step.
    return nn.Parameter(tensor, requires_grad=False)


def _bitsandbytes() -> Any:
    """bitsandbytes.functional, imported only when it is used."""
    try:
        return import_module("bitsandbytes.functional")
    except ImportError as error:
        raise UserError(
            f"[model] quantise = \"nf4\" needs the package bitsandbytes: pip install 'bitsandbytes>=0.46' ({error}). "
            'Or use quantise = "int8", which needs none.'
        ) from error
