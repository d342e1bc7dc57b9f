"""A UNet for GPUs: channels last all the way, and one kernel each for group norm with its SiLU and for GEGLU."""

from __future__ import annotations

from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from lora_diffusion.models.errors import ModelError


def fuse_layers(unet: UNet2DConditionModel) -> None:
    """Make `unet` faster on a GPU; parameters stay the same objects under the same names.

    Pictures lie channels last, as matrix units want them, so that neither a convolution nor a transformer has to turn
    them. On a CPU, or without Triton, the layers put in compute what those before did. Doing it again changes nothing.
    """
    if isinstance(unet.conv_norm_out, FusedNorm):
        return
    for module in list(unet.modules()):
        if isinstance(module, ResnetBlock2D):
            _check_silu(module.nonlinearity)
            module.norm1, module.norm2 = FusedNorm(module.norm1, silu=True), FusedNorm(module.norm2, silu=True)
            module.nonlinearity = _SiLUOfVectors()
        elif isinstance(module, Transformer2DModel):
            module.norm = FusedNorm(module.norm, silu=False)
            module._get_output_for_continuous_inputs = MethodType(_leave_transformer, module)  # pyright: ignore[reportPrivateUsage]
    for path, module in [(path, m) for path, m in unet.named_modules() if isinstance(m, GEGLU)]:
        unet.set_submodule(path, FusedGEGLU(module))
    _check_silu(unet.conv_act)
    unet.conv_norm_out, unet.conv_act = FusedNorm(unet.conv_norm_out, silu=True), nn.Identity()
    unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # moves 4-dimensional weights only


class FusedNorm(nn.GroupNorm):
    """Group norm and, if asked for, SiLU, of pictures (B, C, H, W); what it makes lies channels last on a GPU."""

    def __init__(self, norm: nn.Module | None, *, silu: bool) -> None:
        nn.Module.__init__(self)  # not GroupNorm's, which would make weights
        assert isinstance(norm, nn.GroupNorm) and norm.affine
        self.num_groups, self.num_channels, self.eps = norm.num_groups, norm.num_channels, norm.eps
        self.affine, self.silu = True, silu
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, input: Tensor) -> Tensor:
        if _has_kernels(input):
            from lora_diffusion.models.gpu_kernels import group_norm

            return group_norm(input, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu)
        normal = super().forward(input)
        return nn.functional.silu(normal) if self.silu else normal

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, silu={self.silu}"


class FusedGEGLU(nn.Module):
    """diffusers' GEGLU: a linear layer, and one half of what it makes gated by the other."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer, GEGLU)
        self.proj = layer.proj

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        if _has_kernels(x):
            from lora_diffusion.models.gpu_kernels import geglu

            return geglu(x)
        value, gate = x.chunk(2, dim=-1)
        return value * nn.functional.gelu(gate)


class _SiLUOfVectors(nn.Module):
    """What is left of a ResNet's activation once its norms have one of their own: that of the time embedding."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) if x.ndim == 2 else x


def _leave_transformer(
    self: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
) -> Tensor:
    """As diffusers' own, but what comes out still lies channels last. hidden_states: (B, H·W, C)."""
    if self.use_linear_projection:
        hidden_states = self.proj_out(hidden_states)
    picture = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
    if not self.use_linear_projection:
        picture = self.proj_out(picture)
    return picture + residual


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and find_spec("triton") is not None


def _check_silu(module: object) -> None:
    if not isinstance(module, nn.SiLU):
        raise ModelError(f"the UNet's activation is {type(module).__name__}; Stable Diffusion's is SiLU.")
