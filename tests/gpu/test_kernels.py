"""The Triton kernels, compiled, compute what torch does in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernel_errors import GEGLUS, NORMS, Norm, geglu_errors, norm_errors

pytestmark = pytest.mark.gpu

ALL_NORMS = {
    **NORMS,
    "SD 1.5, 512 px": Norm((1, 320, 64, 64), 32),
    "SD 1.5, deepest": Norm((4, 2560, 8, 8), 32),
    "SDXL, 1024 px": Norm((2, 960, 128, 128), 32, silu=False),
}
ALL_GEGLUS = {**GEGLUS, "SD 1.5, 512 px": (2, 4096, 2560), "SDXL, 1024 px": (1, 1024, 10240)}

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def tolerance(dtype: torch.dtype) -> float:
    """A GPU's float32 exponential is right to 2 units of the last place, what is rounded after it to 1 / 2."""
    if dtype == torch.float32:
        return 2e-6
    # One rounding errs evenly between -eps / 2 and eps / 2 of a power of two: by that over √3 in the mean of squares.
    return torch.finfo(dtype).eps / 2 / math.sqrt(3)


@dtypes
@pytest.mark.parametrize("case", ALL_NORMS)
def test_group_norm_is_that_of_float64_rounded_once(case: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    assert max(norm_errors(ALL_NORMS[case], dtype, "cuda")) < tolerance(dtype)


@dtypes
@pytest.mark.parametrize("case", ALL_GEGLUS)
def test_geglu_is_that_of_float64_rounded_once(case: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    assert max(geglu_errors(ALL_GEGLUS[case], dtype, "cuda")) < tolerance(dtype)
