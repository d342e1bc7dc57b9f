"""A UNet with channels last all the way, and on a GPU kernels of our own for group norm with its SiLU and for GEGLU."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.libraries import GEGLU, ResnetBlock2D, Transformer2DModel, UNet2DConditionModel


def fuse_layers(unet: UNet2DConditionModel) -> None:
    """Make `unet` faster in half precision; its modules and parameters stay the same objects under the same names.

    Pictures lie channels last, as matrix units want them, so that neither a convolution nor a transformer has to turn
    them. Without Triton, or on a CPU, the layers compute what they did before, by torch's own kernels. Doing it again
    changes nothing. Raises ModelError for a UNet that Stable Diffusion never had.
    """
    for module in unet.modules():
        if type(module) is ResnetBlock2D:
            _check_resnet(module)
            module.__class__ = FusedResnet
            _activate(module.norm1, "SiLU")
            _activate(module.norm2, "SiLU")
        elif type(module) is Transformer2DModel:
            module.__class__ = FusedTransformer
            _activate(module.norm, "none")
        elif type(module) is GEGLU:
            module.__class__ = FusedGEGLU
    if type(unet.conv_act) is not nn.Identity:
        _check_silu(unet.conv_act)
        _activate(unet.conv_norm_out, "SiLU")
        unet.conv_act = nn.Identity()
    nn.Module.to(unet, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # of convolutions alone


class FusedNorm(nn.GroupNorm):
    """Group norm and, if asked for, SiLU, of pictures (B, C, H, W); what it makes lies channels last on a GPU."""

    activation: str
    """"SiLU" or "none"."""

    def forward(self, input: Tensor) -> Tensor:
        has_silu = self.activation == "SiLU"
        if _has_kernels(input):
            from lora_diffusion.models.gpu_kernels import group_norm

            return group_norm(input, self.weight, self.bias, self.num_groups, self.eps, silu=has_silu)
        normal = super().forward(input)
        return nn.functional.silu(normal) if has_silu else normal

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FusedResnet(ResnetBlock2D):
    """diffusers' block with its activations in the norms, and without the division by an output scale of 1."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: object, **kwargs: object) -> Tensor:
        """input_tensor: (B, C, H, W). temb: (B, T), the embedding of the timestep."""
        hidden = self.conv1(self.norm1(input_tensor))
        assert self.time_emb_proj is not None
        hidden = hidden + self.time_emb_proj(nn.functional.silu(temb))[:, :, None, None]
        hidden = self.conv2(self.norm2(hidden))
        return hidden + (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))


class FusedTransformer(Transformer2DModel):
    """diffusers' transformer; what it makes lies channels last, as what it is given."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        picture = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            picture = self.proj_out(picture)
        return picture + residual


class FusedGEGLU(GEGLU):
    """diffusers' GEGLU: a linear layer, and one half of what it makes gated by the other."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """hidden_states: (…, in)."""
        both = self.proj(hidden_states)
        if _has_kernels(both):
            from lora_diffusion.models.gpu_kernels import geglu

            return geglu(both)
        value, gate = both.chunk(2, dim=-1)
        return value * self.gelu(gate)


def _activate(norm: nn.Module | None, activation: str) -> None:
    assert type(norm) is nn.GroupNorm
    norm.__class__ = FusedNorm
    norm.activation = activation  # pyright: ignore[reportArgumentType]  # a Module's attributes are declared modules


def _has_kernels(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # torch then writes a kernel for this and what is around it
    return x.is_cuda and find_spec("triton") is not None


def _check_resnet(block: ResnetBlock2D) -> None:
    _check_silu(block.nonlinearity)
    is_plain = block.upsample is None and block.downsample is None and block.time_emb_proj is not None
    if not is_plain or block.time_embedding_norm != "default" or block.output_scale_factor != 1 or block.skip_time_act:
        raise ModelError("the UNet's ResNet blocks are not those of Stable Diffusion.")


def _check_silu(module: object) -> None:
    if not isinstance(module, nn.SiLU):
        raise ModelError(f"the UNet's activation is {type(module).__name__}; Stable Diffusion's is SiLU.")
