"""Changes without a base: the exact factors of every form that a file can have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_diffusion.adapters.geometry import Geometry, geometry_of
from lora_diffusion.adapters.kinds import adapter_from_tensors
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.tools.deltas import change_in, delta_of, direction_factors, factors_of
from tests.adapter_parts import Parts, loha, loha_tucker, lokr, lora, randn, tucker

LINEAR = {
    "lora": lora(),
    "lora without alpha": {part: tensor for part, tensor in lora().items() if part != "alpha"},
    "lora of more rank than the layer": lora(rank=20),
    "loha": loha(),
    "loha of more rank than the layer": loha(rank=5),
    "lokr": lokr("whole"),
    "lokr factored": lokr("factored"),
    "lokr of two factored sides": lokr("both"),
}
CONV = {
    "lora": lora(kernel=(3, 3)),
    "lora with a Tucker core": tucker(),
    "loha": loha(columns=72),
    "loha with Tucker cores": loha_tucker(),
    "lokr": lokr("whole", kernel=(3, 3)),
    "lokr factored": lokr("factored", kernel=(3, 3)),
    "lokr with a Tucker core": lokr("tucker", kernel=(3, 3)),
}
CASES = [
    *(pytest.param(parts, nn.Linear(8, 12), id=f"{name}, linear") for name, parts in LINEAR.items()),
    *(pytest.param(parts, nn.Conv2d(8, 12, 3), id=f"{name}, 3x3") for name, parts in CONV.items()),
]


def geometry(parts: Parts) -> Geometry:
    return geometry_of({part: tuple(tensor.shape) for part, tensor in parts.items()})


def close(actual: Tensor, expected: Tensor) -> None:
    # float32 factors of a handful of terms
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("parts", "layer"), CASES)
def test_the_factors_multiply_to_the_change_that_the_adapter_makes(parts: Parts, layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    up, down = factors_of(parts, geometry(parts))
    expected = adapter_from_tensors(layer, parts).delta().detach().flatten(1)

    assert up.dtype == down.dtype == torch.float32
    assert up.shape[1] == down.shape[0] <= max(8 if isinstance(layer, nn.Linear) else 12, geometry(parts).rank)
    close((up.double() @ down.double()).float(), expected)
    close(delta_of(parts, geometry(parts)), expected)


def test_a_loha_of_more_rank_than_its_layer_needs_no_more_memory_than_the_change() -> None:
    """Rank 64 on 96 x 80: its exact factors would have 64 * 64 columns, 50 times as many as the layer."""
    parts = loha(96, 80, 64)
    exact = {part: tensor.double() for part, tensor in parts.items()}
    expected = 3 / 64 * (exact["hada_w1_a"] @ exact["hada_w1_b"]) * (exact["hada_w2_a"] @ exact["hada_w2_b"])
    sizes = _Sizes()
    with sizes:
        up, down = factors_of(parts, geometry(parts))

    assert up.shape == (96, 80) and down.shape == (80, 80)
    close((up.double() @ down.double()).float(), expected.float())
    assert 0 < sizes.largest <= 96 * 80


class _Sizes(TorchDispatchMode):
    """Watches how many numbers the largest tensor has that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_every_dtype_are_read_without_rounding(dtype: torch.dtype) -> None:
    parts = {part: tensor.to(dtype) for part, tensor in loha().items()}
    exact = {part: tensor.double() for part, tensor in parts.items()}
    expected = 1.5 * (exact["hada_w1_a"] @ exact["hada_w1_b"]) * (exact["hada_w2_a"] @ exact["hada_w2_b"])

    change = delta_of(parts, geometry(parts))

    assert change.dtype == torch.float32
    close(change, expected.float())


def test_a_dora_has_no_change_without_its_base_but_a_direction() -> None:
    parts = lora() | {"dora_scale": randn(1, 8)}
    with pytest.raises(UserError, match="without the base it has no change of its own"):
        factors_of(parts, geometry(parts))

    up, down = direction_factors(parts, geometry(parts))
    close(up @ down, delta_of(lora(), geometry(lora())))


@pytest.mark.parametrize("alpha", [1e38, -1e38])
def test_a_change_beyond_float32_is_an_error_that_names_file_and_module(alpha: float) -> None:
    parts = lora() | {"alpha": torch.tensor(alpha), "lora_up.weight": torch.full((12, 4), 100.0)}

    with pytest.raises(UserError, match=r"a\.safetensors: layer: its change is too large"):
        change_in(AdapterFile({"layer": parts}, path=Path("a.safetensors")), "layer")
