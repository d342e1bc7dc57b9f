"""The UNet's attention as we compute it, against diffusers' own."""

from __future__ import annotations

import pytest
import torch

from lora_diffusion.models.attention import FasterOnCPU, FasterOnGPU
from lora_diffusion.models.libraries import Attention, AttnProcessor

BATCH, WIDTH, TEXT_WIDTH, HEADS, TOKENS = 2, 32, 24, 4, 21


def layer(*, is_cross: bool, upcasts: bool = False, dtype: torch.dtype = torch.float64) -> Attention:
    torch.manual_seed(0)
    text_width = TEXT_WIDTH if is_cross else None
    return Attention(WIDTH, text_width, heads=HEADS, dim_head=WIDTH // HEADS, upcast_attention=upcasts).to(dtype)


def inputs(*, is_cross: bool, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(BATCH, TOKENS, WIDTH), (BATCH, 7, TEXT_WIDTH)][: 1 + is_cross]
    drawn = torch.Generator().manual_seed(1)
    return [3 * torch.randn(shape, generator=drawn, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("is_cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("plain_pairs", [0, 10**6], ids=["fused", "plain"])
@pytest.mark.parametrize("processor", [FasterOnCPU, FasterOnGPU])
def test_output_and_gradients_are_those_of_diffusers(
    processor: type[FasterOnCPU | FasterOnGPU], plain_pairs: int, is_cross: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FasterOnCPU, "MAX_PLAIN_PAIRS", plain_pairs)
    attention = layer(is_cross=is_cross)
    results: list[list[torch.Tensor]] = []
    for chosen in (AttnProcessor(), processor()):
        attention.set_processor(chosen)  # pyright: ignore[reportArgumentType]  # diffusers names one of its own
        given = inputs(is_cross=is_cross)
        output = attention(*given)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), given)])

    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # float64's rounding


@pytest.mark.parametrize("upcasts", [False, True])
def test_plain_attention_in_bfloat16_rounds_where_diffusers_does(upcasts: bool) -> None:
    attention = layer(is_cross=True, upcasts=upcasts, dtype=torch.bfloat16)
    results: list[torch.Tensor] = []
    for chosen in (AttnProcessor(), FasterOnCPU()):
        attention.set_processor(chosen)  # pyright: ignore[reportArgumentType]  # diffusers names one of its own
        results.append(attention(*inputs(is_cross=True, dtype=torch.bfloat16)))

    assert torch.equal(results[1], results[0])


@pytest.mark.parametrize("trains", [False, True])
def test_without_a_backward_pass_attention_in_bfloat16_is_fused(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def count(*args: torch.Tensor) -> torch.Tensor:
        calls.append("fused")
        return fused(*args)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    attention = layer(is_cross=False, dtype=torch.bfloat16).requires_grad_(False)
    attention.set_processor(FasterOnCPU())  # pyright: ignore[reportArgumentType]  # diffusers names one of its own
    attention(*(x.detach().requires_grad_(trains) for x in inputs(is_cross=False, dtype=torch.bfloat16)))
    assert calls == ([] if trains else ["fused"])
