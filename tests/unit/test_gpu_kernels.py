"""The Triton kernels compute what torch does in float64; here in Triton's interpreter, so that no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel_errors import GEGLUS, NORMS, Errors

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def errors() -> dict[str, Errors]:
    """Triton interprets for a whole process or not at all, so this has one of its own."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernel_errors"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in run.stderr:
        pytest.skip("the interpreter of this Triton needs a NumPy before 2.4")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", [*NORMS, *GEGLUS])
def test_outputs_and_gradients_are_those_of_float64(case: str, errors: dict[str, Errors]) -> None:
    # Each number is rounded a few times, by at most 6e-8 of itself.
    assert max(errors[case]) < 1e-6
