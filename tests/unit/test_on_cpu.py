"""UNets in the form that a CPU computes fastest in, against the form that they were loaded in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_diffusion.models.attention import projections_with_one_input
from lora_diffusion.models.fused_layers import FusedResnet
from lora_diffusion.models.libraries import UNet2DConditionModel
from lora_diffusion.models.load import load_model
from lora_diffusion.models.on_cpu import suit_to_cpu
from lora_diffusion.models.packed_conv import PackedConv2d, PointwiseConv2d, has_fast_bf16
from lora_diffusion.models.packed_linear import PackedLinear
from tests.training_runs import ROOT

packs = pytest.mark.skipif(not has_fast_bf16(), reason="needs a CPU that computes in bfloat16")
PIXELS = 16 * 16


def load(dtype: torch.dtype) -> UNet2DConditionModel:
    return load_model(ROOT / "samples" / "base", dtype=dtype).unet


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predict(unet: UNet2DConditionModel, *, with_gradient: bool) -> list[Tensor]:
    """The prediction for latents, and the gradient of its product with a random direction."""
    noisy = draw(2, 4, 16, 16, seed=1).to(unet.dtype).requires_grad_(with_gradient)
    text = draw(2, 77, unet.config["cross_attention_dim"], seed=2).to(unet.dtype)
    output: Tensor = unet(noisy, torch.tensor([3, 700]), encoder_hidden_states=text).sample
    if not with_gradient:
        return [output.double()]
    (gradient,) = torch.autograd.grad(output, noisy, draw(*output.shape, seed=3).to(unet.dtype))
    return [output.detach().double(), gradient.double()]


@packs
@pytest.mark.parametrize("needs_gradients", [True, False])
def test_in_bfloat16_it_is_as_near_to_float32_as_before(needs_gradients: bool) -> None:
    exact = predict(load(torch.float32), with_gradient=needs_gradients)
    unet = load(torch.bfloat16)
    before = predict(unet, with_gradient=needs_gradients)
    suit_to_cpu(unet, PIXELS, needs_gradients=needs_gradients)
    kinds = {type(module) for module in unet.modules()}
    assert kinds >= {FusedResnet, PackedConv2d, PointwiseConv2d}
    after = predict(unet, with_gradient=needs_gradients)
    for value, earlier, true in zip(after, before, exact, strict=True):
        # Sums are rounded in another order; what that makes of a prediction varies by some tenths.
        assert (value - true).norm() < 1.5 * (earlier - true).norm()


@packs
def test_for_pictures_alone_no_second_order_of_the_weights_is_kept() -> None:
    unet = load(torch.bfloat16)
    suit_to_cpu(unet, 1, needs_gradients=False)  # so few that in training all linear layers would be packed
    packed = [module for module in unet.modules() if isinstance(module, PackedConv2d)]
    assert packed and all(module.packed_mirror is None for module in packed)
    assert not any(isinstance(module, PackedLinear) for module in unet.modules())  # many rows: they would lose


def test_in_float32_and_float16_no_convolution_is_packed() -> None:
    for dtype in (torch.float32, torch.float16):
        unet = load(dtype)
        suit_to_cpu(unet, PIXELS)
        assert not any(isinstance(module, PackedConv2d | PointwiseConv2d | FusedResnet) for module in unet.modules())


@packs
def test_wide_linear_layers_are_packed_but_for_those_computed_together() -> None:
    unet = load(torch.bfloat16)
    suit_to_cpu(unet, 1)  # so few rows that all of the base's, which is narrow, would gain
    together = [layer for layers in projections_with_one_input(unet) for layer in layers]
    packed = {path.rpartition(".")[2] for path, layer in unet.named_modules() if isinstance(layer, PackedLinear)}
    assert together and all(type(layer) is torch.nn.Linear for layer in together)
    assert packed >= {"to_q", "proj", "2"} and not packed & {"to_k", "to_v"}
