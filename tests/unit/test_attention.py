"""The UNet's attention as we compute it, against diffusers' own."""

from __future__ import annotations

import pytest
import torch

from lora_diffusion.models.attention import FasterOnCPU, FasterOnGPU, _PlainAttention
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


@pytest.mark.parametrize(
    "needed", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_plain_attention_as_one_step_is_what_autograd_makes_of_it(needed: tuple[bool, bool, bool]) -> None:
    """Of parts of larger tensors, as projections make them, and only the gradients that are asked for."""
    drawn = torch.Generator().manual_seed(1)
    queries, others = (torch.randn(3, count, 24, generator=drawn, dtype=torch.float64) for count in (5, 7))
    parts = [queries[..., :8], others[..., 8:16], others[..., 16:]]
    query, key, value = given = [part.detach().requires_grad_(is_so) for part, is_so in zip(parts, needed, strict=True)]
    asked = [part for part in given if part.requires_grad]
    plain = (0.3 * query @ key.mT).softmax(-1) @ value
    ours = _PlainAttention.apply(query, key, value, 0.3)

    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)  # float64's rounding
    expected, made = (torch.autograd.grad(output.square().sum(), asked) for output in (plain, ours))
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


def test_training_in_bfloat16_keeps_no_scores() -> None:
    attention = layer(is_cross=False, dtype=torch.bfloat16)
    attention.set_processor(FasterOnCPU())  # pyright: ignore[reportArgumentType]  # diffusers names one of its own
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attention(*inputs(is_cross=False, dtype=torch.bfloat16))

    assert [tensor.shape for tensor in saved].count((BATCH * HEADS, TOKENS, TOKENS)) == 1


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
